# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Predictions on pictures and videos, drawn and as JSON.

The toolboxes' inferencers keep the results of a whole folder in memory, stop at the first damaged file, name results
by the stem of the file alone, and replace the loader that the config names. So this module runs the config's own
test pipeline batch by batch. Models, test pipelines and drawings are the toolboxes'.
"""

import copy
import json
import math
import os
from itertools import chain, groupby, islice
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)
from uuid import uuid4

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, TRANSFORMS, VISUALIZERS, DefaultScope
from PIL import Image, UnidentifiedImageError

from mmlinglo.checkpoint import load_model_weights

from .cli import holds_pixels
from .deploy import build_model, has_deployed_form, switch_to_deploy
from .files import complete_file

PICTURE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
VIDEO_SUFFIXES = ('.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm', '.wmv')
DRAWINGS, PREDICTIONS = 'vis', 'preds'  # folders, named as by mmdet's inferencer
# What each toolbox draws with. The picture behind a segmentor's labels stays visible.
VISUALIZER: Dict[str, dict] = dict(
    mmdet=dict(type='DetLocalVisualizer'),
    mmpretrain=dict(type='UniversalVisualizer'),
    mmseg=dict(type='SegLocalVisualizer', alpha=0.5),
)


class UnreadableError(ValueError):
    """A picture or video that cannot be read, or not to its end."""


class Sample(NamedTuple):
    """An image (H, W, C) as the config's loader gives it, and what the test pipeline makes of it."""

    image: np.ndarray
    data: Dict[str, Any]

    @property
    def shape(self) -> torch.Size:
        """Shape of what the model takes."""
        return self.data['inputs'].shape


class Prediction(NamedTuple):
    """What goes to JSON, a drawing (H, W, 3) in BGR, and a segmentor's class numbers (H, W)."""

    result: Dict[str, Any]
    drawing: np.ndarray
    labels: Optional[np.ndarray] = None


class InputPipeline:
    """The test pipeline of a config, without the loading of annotations.

    Args:
        cfg: The experiment's config.

    Raises:
        ValueError: If the config has no test pipeline.
    """

    def __init__(self, cfg: Config) -> None:
        dataset = (cfg.get('test_dataloader') or {}).get('dataset', {})
        if 'pipeline' not in dataset:
            raise ValueError(
                'the config has no test_dataloader.dataset.pipeline, which prepares the images'
            )
        # Data sets that hold the pixels, RGB, and so have no loader.
        self.holds_pixels = holds_pixels(dataset)
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
            self.transforms = [
                TRANSFORMS.build(step)
                for step in copy.deepcopy(dataset['pipeline'])
                if 'Annotation' not in getattr(step['type'], '__name__', step['type'])
            ]

    def __call__(self, source: Union[Path, np.ndarray], channels: Optional[int] = None) -> Sample:
        """Prepare one image.

        Args:
            source: A file, which the config's loader reads, or an image (H, W, C) of uint8, BGR.
            channels: Number of channels that the image must have; None for any.

        Raises:
            UnreadableError: If the file is missing, empty or cut off, or the loader fails.
            ValueError: If the image has another number of channels.
        """
        # the keys with which the toolboxes' data sets start
        results: Dict[str, Any] = dict(img_path=None, img_id=0, sample_idx=0, seg_fields=[])
        steps = iter(self.transforms)
        if isinstance(source, Path):
            check_picture_file(source)
            results['img_path'] = str(source)
            image = mmcv.imread(str(source)) if self.holds_pixels else None
        else:
            image = source
        if image is not None:
            pixels = image[..., ::-1] if self.holds_pixels else image
            results.update(img=pixels, img_shape=image.shape[:2], ori_shape=image.shape[:2])
            if not self.holds_pixels:
                next(steps)  # the loader
        while results.get('img') is None:
            try:
                results = next(steps)(results)
            except Exception as error:  # any: the loader may be the user's own
                raise UnreadableError(f'the loader of the config fails: {error}') from error
        if image is None:
            image = results['img']
        # A loader may give one channel as (H, W).
        if channels and image.shape[2:] != (channels,) and (channels > 1 or image.ndim > 2):
            raise ValueError(
                f'the picture must have the shape (H, W, {channels}), as the backbone has '
                f'in_channels={channels}, got {image.shape}'
            )
        for step in steps:
            results = step(results)
        return Sample(image, results)


class Predictor:
    """The model of an experiment, with its test pipeline and its way to draw.

    Args:
        cfg: The experiment's config.
        checkpoint: What :func:`~mmlinglo.utils.load_checkpoint_file` returned.
        source: Name of the checkpoint for messages.
        device: Such as ``'cpu'`` or ``'cuda:0'``.
        score_thr: Score above which boxes and masks are drawn; the results hold all.
        deploy: Whether to re-parameterise the model.

    Attributes:
        model: In evaluation mode.
        load: Prepares a file, or an image (H, W, 3) of uint8, BGR; see :class:`InputPipeline`.
        classes: Names of the classes, if they are known.

    Raises:
        CheckpointError: If the weights are another model's.
        ValueError: If the config is of no toolbox or has no test pipeline, a segmentor's
            classes have no names, or nothing can be re-parameterised.
    """

    def __init__(
        self,
        cfg: Config,
        checkpoint: dict,
        source: str,
        device: str,
        score_thr: float = 0.3,
        deploy: bool = False,
    ) -> None:
        scope = cfg.default_scope
        if scope not in VISUALIZER:
            raise ValueError(f'default_scope must be one of {sorted(VISUALIZER)}, got {scope!r}')
        self.load = InputPipeline(cfg)
        self.model = build_model(cfg).eval()
        if deploy and not has_deployed_form(self.model):
            raise ValueError(
                'the model has no part that can be re-parameterised: leave out --deploy'
            )
        load_model_weights(self.model, checkpoint, source)
        self.classes, palette = class_names(cfg, checkpoint)
        if scope == 'mmseg' and not self.classes:
            raise ValueError(
                f'neither {source!r} nor the config names the classes: '
                'set test_dataloader.dataset.metainfo'
            )
        if deploy:
            switch_to_deploy(self.model)
        self.model.to(device)
        self.score_thr = score_thr
        settings = dict(VISUALIZER[scope], **(cfg.get('visualizer') or {}))
        # mmengine has one visualizer of each name, which other predictors of this process may use
        settings.update(vis_backends=None, save_dir=None, name=uuid4().hex)
        self.visualizer = VISUALIZERS.build(settings)
        self.visualizer.dataset_meta = dict(classes=self.classes, palette=palette)

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> List[Prediction]:
        """Predict for samples of one :attr:`Sample.shape`: none of them gets padding."""
        outputs = self.model.test_step(pseudo_collate([sample.data for sample in samples]))
        return [
            self._describe(as_picture(sample.image), output.cpu())
            for sample, output in zip(samples, outputs)
        ]

    def _describe(self, image: np.ndarray, output: Any) -> Prediction:
        classes, visualizer, labels = self.classes, self.visualizer, None
        if 'pred_score' in output:
            visualizer.visualize_cls(image, output, draw_gt=False)
            label, scores = int(output.pred_score.argmax()), output.pred_score.tolist()
            result = dict(pred_scores=scores, pred_label=label, pred_score=scores[label])
            if classes:
                result['pred_class'] = classes[label]
        elif 'pred_instances' in output:
            from mmdet.apis import DetInferencer

            visualizer.add_datasample(
                '', image, output, draw_gt=False, pred_score_thr=self.score_thr
            )
            result = DetInferencer.pred2dict(self, output)
            if classes:
                result['label_names'] = [classes[label] for label in result['labels']]
        else:
            # mmseg's own sorts all pixels in Python, which takes seconds for each large picture.
            visualizer._get_center_loc = centre_of_largest_row
            visualizer.add_datasample('', image, output, draw_gt=False)
            labels = output.pred_sem_seg.data[0].numpy()
            labels = labels.astype(np.uint8 if labels.max() < 256 else np.uint16)
            counts = zip(*np.unique(labels, return_counts=True))
            shares = [(int(label), round(count / labels.size, 6)) for label, count in counts]
            found = [dict(label=label, name=classes[label], share=share) for label, share in shares]
            result = dict(classes=found)
        return Prediction(result, visualizer.get_image()[..., ::-1], labels)


def class_names(cfg: Config, checkpoint: dict) -> Tuple[Optional[Sequence[str]], list]:
    """Names and colours of the classes: the checkpoint's, else those of the config's test data."""
    stored = (checkpoint.get('meta') or {}).get('dataset_meta')
    meta = {str(k).lower(): v for k, v in stored.items()} if isinstance(stored, dict) else {}
    if not meta.get('classes') or not isinstance(meta['classes'], (list, tuple)):
        dataset = copy.deepcopy(cfg.test_dataloader.dataset)
        dataset.lazy_init = True  # the data themselves are not needed
        meta = DATASETS.build(dataset).metainfo
    classes, palette = meta.get('classes'), meta.get('palette')
    if not isinstance(palette, (list, tuple)) or len(palette) < len(classes or ()):
        palette = np.random.RandomState(42).randint(0, 256, (len(classes or range(256)), 3))
    return classes, [tuple(map(int, colour)) for colour in palette]


def as_picture(image: np.ndarray) -> np.ndarray:
    """An image (H, W, C) or (H, W) as RGB (H, W, 3) of uint8: its first three channels, or its first one as grey."""
    image = image.reshape(*image.shape[:2], -1)
    image = image[..., 2::-1] if image.shape[2] > 2 else image[..., :1].repeat(3, axis=2)
    if image.dtype != np.uint8:
        image = image * np.float32(min(1, 255 / max(1, image.max())))
    return np.ascontiguousarray(image.clip(0, 255), np.uint8)


def list_files(folder: Path, skip: Sequence[Path] = ()) -> Iterator[str]:
    """Names of all files in a folder and its sub-folders, relative to it, sorted in each.

    Links to folders are followed, but no folder is visited twice. Hidden files and folders are
    left out, and the folders in ``skip``.
    """
    visited = {os.path.realpath(path) for path in skip}
    for root, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(root))
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        for name in sorted(files):
            if not name.startswith('.'):
                yield os.path.relpath(os.path.join(root, name), folder)


def check_picture_file(path: Path) -> None:
    """Raise UnreadableError if a file is missing or empty, cannot be read, or is a JPEG that is cut off."""
    if not path.is_file() or not path.stat().st_size:
        raise UnreadableError('the file is missing, empty or not a regular file')
    try:
        # OpenCV below 4.12 fills what is missing with grey. At an eighth of its size, the picture
        # costs Pillow a fraction of OpenCV's time.
        with Image.open(path, formats=['JPEG']) as image:
            image.draft('L', (image.width // 8, image.height // 8))
            image.load()
    except (UnidentifiedImageError, Image.DecompressionBombError):
        pass  # another format, or OpenCV may know better
    except OSError as error:
        raise UnreadableError(f'damaged: {error}') from error


def predict_in_batches(
    predictor: Predictor, sources: Iterable[Tuple[Any, Union[Path, np.ndarray]]], batch_size: int
) -> Iterator[Tuple[Any, Union[Prediction, Exception]]]:
    """Predict for named files or images. Never more than one batch is in memory.

    Args:
        predictor: The model.
        sources: Names, and what :attr:`Predictor.load` takes.
        batch_size: How many go through the model together; fewer if the test pipeline leaves them
            at different sizes, since padding would change the features.

    Yields:
        Each name and the prediction, or the error: one that fails does not stop the others.
    """
    loaded = ((name, _result_or_error(predictor.load, source)) for name, source in sources)
    for _, group in groupby(loaded, key=lambda item: getattr(item[1], 'shape', None)):
        while batch := list(islice(group, batch_size)):
            yield from _predict_batch(predictor, batch)


def _predict_batch(predictor: Predictor, batch: List[Tuple[Any, Any]]) -> Iterable[Tuple[Any, Any]]:
    names, samples = zip(*batch)
    if isinstance(samples[0], Exception):
        return batch
    found = _result_or_error(predictor, samples)
    if not isinstance(found, Exception):
        return zip(names, found)
    if len(batch) == 1:
        return [(names[0], found)]
    return chain.from_iterable(_predict_batch(predictor, [item]) for item in batch)


def _result_or_error(function: Callable, argument: Any) -> Any:
    try:
        return function(argument)
    except Exception as error:  # any: the others are to be done
        return error


def annotate_pictures(
    predictor: Predictor, folder: Path, names: Iterable[str], out_dir: Path, batch_size: int = 1
) -> Iterator[Tuple[str, Optional[str]]]:
    """Predict for pictures and write ``vis/NAME`` and ``preds/NAME.json`` for each.

    Args:
        predictor: The model.
        folder: Where the pictures are.
        names: Their names relative to ``folder``, within it.
        out_dir: Folder for the results.
        batch_size: See :func:`predict_in_batches`.

    Yields:
        Name of each picture and None, or what was wrong with it.
    """
    sources = ((name, folder / name) for name in names)
    for name, found in predict_in_batches(predictor, sources, batch_size):
        if isinstance(found, Exception):
            kind = '' if isinstance(found, UnreadableError) else f'{type(found).__name__}: '
            yield name, kind + (str(found).splitlines() or [''])[0]
            continue
        result = out_dir / PREDICTIONS / f'{name}.json'
        record = _record(found, result.parent, f'{result.stem}.png')
        with complete_file(result) as file:
            file.write_text(json.dumps(dict(input=name, **record)))
        drawing = name if name.lower().endswith(PICTURE_SUFFIXES) else f'{name}.jpg'
        _write_image(out_dir / DRAWINGS / drawing, found.drawing)
        yield name, None


def annotate_video(
    predictor: Predictor, reader: mmcv.VideoReader, name: str, out_dir: Path, batch_size: int = 1
) -> Iterator[int]:
    """Predict for the frames of a video; write a video and ``preds/NAME.jsonl``, a line a frame.

    The video, ``vis/NAME`` with ``.mp4`` appended if the name ends otherwise, has no sound; a
    last odd row or column of pixels is lost in it. Label images go to ``preds/NAME/``. Never
    more than a few frames are in memory. Yields the numbers of the frames done, from 0.

    Raises:
        UnreadableError: If there are no frames or they change in size; nothing but label images
            is left then. Also if more than a second is missing at the end, after the results
            for the rest are written.
    """
    rate = reader.fps if 0 < reader.fps < math.inf else 30.0  # mmcv's default
    drawing_name = name if name.lower().endswith('.mp4') else f'{name}.mp4'
    predictions = out_dir / PREDICTIONS
    done, size, writer = 0, None, cv2.VideoWriter()
    with (
        complete_file(out_dir / DRAWINGS / drawing_name) as video,
        complete_file(predictions / f'{name}.jsonl') as lines,
        lines.open('w') as stream,
    ):
        try:
            for number, found in predict_in_batches(predictor, enumerate(reader), batch_size):
                if isinstance(found, Exception):
                    raise found
                if size is None:
                    size = found.drawing.shape[1::-1]
                    writer.open(str(video), cv2.VideoWriter.fourcc(*'mp4v'), rate, size)
                if not writer.isOpened() or found.drawing.shape[1::-1] != size:
                    raise UnreadableError(
                        f'its frames change in size, or OpenCV writes no video of {size[0]} x '
                        f'{size[1]}; opencv-python has FFmpeg inside, which is needed'
                    )
                record = _record(found, predictions, f'{name}/{number:06d}.png')
                when = dict(frame=number, time=round(number / rate, 6))
                stream.write(json.dumps({**when, **record}) + '\n')
                writer.write(found.drawing)
                yield number
                done += 1
        finally:
            writer.release()
        if not done:
            raise UnreadableError('OpenCV can read no frame of it')
    # Some containers know only the rounded length of the longest track.
    if done + rate < reader.frame_cnt:
        raise UnreadableError(
            f'it is damaged: only {done} of {reader.frame_cnt} frames could be read; they are done'
        )


def centre_of_largest_row(mask: np.ndarray) -> np.ndarray:
    """Where mmseg writes the name of a class: column and row of the middle pixel of the row with most of its pixels."""
    row = np.count_nonzero(mask == 1, axis=1).argmax()
    columns = np.flatnonzero(mask[row] == 1)
    return np.array([columns[len(columns) // 2], row])


def _record(prediction: Prediction, folder: Path, name: str) -> dict:
    """Entries of a JSON file in ``folder``; writes the label image ``name`` there if there is one."""
    height, width = prediction.drawing.shape[:2]
    record = dict(height=height, width=width, **prediction.result)
    if prediction.labels is not None:
        _write_image(folder / name, prediction.labels)
        record['label_image'] = name
    return record


def _write_image(path: Path, image: np.ndarray) -> None:
    with complete_file(path) as file:
        mmcv.imwrite(image, str(file))

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Predictions on pictures and videos, drawn and as JSON.

The toolboxes' inferencers keep the results of a whole folder in memory, stop at the first damaged file, name results
by the stem of the file alone, and replace the loader that the config names. So this module runs the config's own
test pipeline batch by batch. Models, test pipelines and drawings are the toolboxes'.
"""

import copy
import io
import json
import math
import os
from itertools import islice
from pathlib import Path, PurePath
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union
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

from .deploy import build_model, switch_to_deploy
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
        else:
            results.update(img=source, img_shape=source.shape[:2], ori_shape=source.shape[:2])
            next(steps)
        while results.get('img') is None:
            try:
                results = next(steps)(results)
            except Exception as error:  # any: the loader may be the user's own
                raise UnreadableError(f'the loader of the config fails: {error}') from error
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
        if deploy and not any(hasattr(part, 'switch_to_deploy') for part in self.model.modules()):
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
        describe = dict(mmdet=self._detections, mmpretrain=self._class, mmseg=self._segments)
        self.describe = describe[scope]
        settings = dict(VISUALIZER[scope], **(cfg.get('visualizer') or {}))
        # mmengine has one visualizer of each name, which other predictors of this process may use
        settings.update(vis_backends=None, save_dir=None, name=uuid4().hex)
        self.visualizer = VISUALIZERS.build(settings)
        self.visualizer.dataset_meta = dict(classes=self.classes, palette=palette)

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> List[Prediction]:
        """Predict for samples whose ``data['inputs']`` have one shape: none of them gets padding."""
        outputs = self.model.test_step(pseudo_collate([sample.data for sample in samples]))
        return [
            self.describe(as_picture(sample.image), output.cpu())
            for sample, output in zip(samples, outputs)
        ]

    def _detections(self, image: np.ndarray, sample: Any) -> Prediction:
        self.visualizer.add_datasample(
            '', image, sample, draw_gt=False, pred_score_thr=self.score_thr
        )
        found = sample.pred_instances
        result = {key: found[key].tolist() for key in ('labels', 'scores', 'bboxes')}
        if self.classes:
            result['label_names'] = [self.classes[label] for label in result['labels']]
        if 'masks' in found:
            from mmdet.structures.mask import encode_mask_results

            result['masks'] = encode_mask_results(found.masks)
            for mask in result['masks']:
                mask['counts'] = mask['counts'].decode()
        return Prediction(result, self.visualizer.get_image()[..., ::-1])

    def _segments(self, image: np.ndarray, sample: Any) -> Prediction:
        # mmseg's own sorts all pixels in Python, which takes seconds for each large picture.
        self.visualizer._get_center_loc = centre_of_largest_row
        self.visualizer.add_datasample('', image, sample, draw_gt=False)
        labels = sample.pred_sem_seg.data[0].numpy()
        labels = labels.astype(np.uint8 if labels.max() < 256 else np.uint16)
        found = [
            dict(label=int(label), name=self.classes[label], share=round(count / labels.size, 6))
            for label, count in zip(*np.unique(labels, return_counts=True))
        ]
        return Prediction(dict(classes=found), self.visualizer.get_image()[..., ::-1], labels)

    def _class(self, image: np.ndarray, sample: Any) -> Prediction:
        drawing = self.visualizer.visualize_cls(image, sample, draw_gt=False)
        label = int(sample.pred_score.argmax())
        scores = sample.pred_score.tolist()
        result = dict(pred_scores=scores, pred_label=label, pred_score=scores[label])
        if self.classes:
            result['pred_class'] = self.classes[label]
        return Prediction(result, drawing[..., ::-1])


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


def check_picture_file(path: Path) -> bytes:
    """Read a file; raise UnreadableError if it is missing, empty, or a JPEG that is cut off."""
    if not path.is_file():
        raise UnreadableError('not a regular file' if path.exists() else 'no such file')
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UnreadableError(error.strerror) from error
    if not content:
        raise UnreadableError('the file is empty')
    if content.startswith(b'\xff\xd8'):
        # OpenCV below 4.12 fills what is missing with grey. At an eighth of its size, the picture
        # costs Pillow a fraction of OpenCV's time.
        try:
            with Image.open(io.BytesIO(content)) as image:
                image.draft('L', (image.width // 8, image.height // 8))
                image.load()
        except (UnidentifiedImageError, Image.DecompressionBombError):
            pass  # OpenCV may know better
        except OSError as error:
            raise UnreadableError(f'damaged JPEG: {error}') from error
    return content


def read_picture(path: Path) -> np.ndarray:
    """Read a picture as mmcv does by default: (H, W, 3) of uint8, BGR, turned upright, without alpha.

    Raises:
        UnreadableError: If the file is missing, empty, cut off, or no picture.
    """
    try:
        image = mmcv.imfrombytes(check_picture_file(path), flag='color')
    except cv2.error as error:
        raise UnreadableError(f'OpenCV: {error.err}') from error
    if image is None:
        raise UnreadableError('no picture that OpenCV can decode')
    return image


def annotate_pictures(
    predictor: Predictor, folder: Path, names: Iterable[str], out_dir: Path, batch_size: int = 1
) -> Iterator[Tuple[str, Optional[str]]]:
    """Predict for pictures and write ``vis/NAME`` and ``preds/NAME.json`` for each.

    A picture that fails does not stop the others. Never more than one batch is in memory.

    Args:
        predictor: The model.
        folder: Where the pictures are.
        names: Their names relative to ``folder``.
        out_dir: Folder for the results.
        batch_size: How many pictures go through the model together; fewer if the test pipeline
            leaves them at different sizes, since padding would change the features.

    Yields:
        Name of each picture and None, or what was wrong with it.

    Raises:
        ValueError: If a name leads out of the folder.
    """
    batch: List[Tuple[str, Sample]] = []
    for name in names:
        if os.path.isabs(name) or '..' in PurePath(name).parts:
            raise ValueError(f'names must stay within the folder, got {name!r}')
        try:
            sample = predictor.load(folder / name)
        except Exception as error:  # any: the other pictures are to be done
            yield name, _describe(error)
            continue
        shape = sample.data['inputs'].shape
        if batch and (len(batch) == batch_size or batch[0][1].data['inputs'].shape != shape):
            yield from _annotate_batch(predictor, batch, out_dir)
            batch = []
        batch.append((name, sample))
    if batch:
        yield from _annotate_batch(predictor, batch, out_dir)


def _annotate_batch(
    predictor: Predictor, batch: List[Tuple[str, Sample]], out_dir: Path
) -> Iterator[Tuple[str, Optional[str]]]:
    try:
        predictions = predictor([sample for _, sample in batch])
    except Exception as error:  # any: the other pictures are to be done
        if len(batch) == 1:
            yield batch[0][0], _describe(error)
        else:
            for item in batch:
                yield from _annotate_batch(predictor, [item], out_dir)
        return
    for (name, sample), prediction in zip(batch, predictions):
        result = out_dir / PREDICTIONS / f'{name}.json'
        record = _record(sample.image, prediction, result.parent, f'{result.stem}.png')
        with complete_file(result) as file:
            file.write_text(json.dumps(dict(input=name, **record)))
        drawing = name if name.lower().endswith(PICTURE_SUFFIXES) else f'{name}.jpg'
        _write_image(out_dir / DRAWINGS / drawing, prediction.drawing)
        yield name, None


def open_video(path: Path) -> mmcv.VideoReader:
    """Open a video; raise UnreadableError if OpenCV cannot read it."""
    reader = mmcv.VideoReader(str(path))
    if not reader.opened:
        raise UnreadableError('no video that OpenCV can read')
    return reader


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
    # Without a stated rate mmcv's own default.
    rate = reader.fps if math.isfinite(reader.fps) and reader.fps > 0 else 30.0
    drawing_name = name if name.lower().endswith('.mp4') else f'{name}.mp4'
    predictions = out_dir / PREDICTIONS
    frames = (frame for frame in reader)  # islice would rewind the reader itself
    done, writer, shape = 0, cv2.VideoWriter(), None
    with (
        complete_file(out_dir / DRAWINGS / drawing_name) as video,
        complete_file(predictions / f'{name}.jsonl') as lines,
        lines.open('w') as stream,
    ):
        try:
            for batch in iter(lambda: list(islice(frames, batch_size)), []):
                shape = shape or batch[0].shape
                if any(frame.shape != shape for frame in batch):
                    raise UnreadableError('its frames change in size')
                for prediction in predictor([predictor.load(frame) for frame in batch]):
                    size = prediction.drawing.shape[1::-1]
                    if not done and not writer.open(
                        str(video), cv2.VideoWriter.fourcc(*'mp4v'), rate, size
                    ):
                        raise UnreadableError(
                            f'OpenCV writes no video of {size[0]} x {size[1]}; opencv-python has '
                            'FFmpeg inside, which is needed'
                        )
                    record = _record(batch[0], prediction, predictions, f'{name}/{done:06d}.png')
                    when = dict(frame=done, time=round(done / rate, 6))
                    stream.write(json.dumps({**when, **record}) + '\n')
                    writer.write(prediction.drawing)
                    yield done
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


def _record(image: np.ndarray, prediction: Prediction, folder: Path, name: str) -> dict:
    """Entries of a JSON file in ``folder``; writes the label image ``name`` there if there is one."""
    record = dict(height=image.shape[0], width=image.shape[1], **prediction.result)
    if prediction.labels is not None:
        _write_image(folder / name, prediction.labels)
        record['label_image'] = name
    return record


def _describe(error: Exception) -> str:
    kind = '' if isinstance(error, UnreadableError) else f'{type(error).__name__}: '
    return kind + (str(error).splitlines() or [''])[0]


def _write_image(path: Path, image: np.ndarray) -> None:
    with complete_file(path) as file:
        mmcv.imwrite(image, str(file))

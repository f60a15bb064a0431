# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Predictions on pictures and videos by the toolboxes' inferencers, drawn and as JSON.

The inferencers run stage by stage on images in memory instead of on files: they would keep all results of a
folder in memory, stop at the first damaged file and name results by the stem of the file alone.
"""

import copy
import io
import json
import math
import os
import tempfile
from abc import ABC, abstractmethod
from itertools import islice
from pathlib import Path, PurePath
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import DATASETS
from PIL import Image, UnidentifiedImageError

from mmlinglo.checkpoint import load_model_weights

from .deploy import build_model, switch_to_deploy
from .files import complete_file

PICTURE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
VIDEO_SUFFIXES = ('.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm', '.wmv')
VIDEO_FORMATS = (('mp4v', '.mp4'), ('MJPG', '.avi'))  # OpenCV writes the second without FFmpeg
DEFAULT_FRAME_RATE = 30.0  # of videos that do not tell theirs; mmcv's choice too
DRAWINGS, PREDICTIONS = 'vis', 'preds'  # folders, named as by mmdet's inferencer


class UnreadableError(ValueError):
    """A picture or video that cannot be read, or not to its end."""


class Prediction(NamedTuple):
    """Predictions for one image.

    ``result`` goes to JSON, ``drawing`` is the image (H, W, 3), BGR, with the
    predictions drawn on it, ``labels`` a segmentor's class numbers (H, W).
    """

    result: Dict[str, Any]
    drawing: np.ndarray
    labels: Optional[np.ndarray] = None


class Predictor(ABC):
    """An inferencer as a function from a batch of images to predictions.

    Subclasses build ``inferencer`` and define ``samples`` and ``prediction``.
    """

    # Padding to the largest picture of a batch would change the features of the others.
    mixed_sizes = False
    inferencer: Any

    def __call__(self, images: Sequence[np.ndarray]) -> List[Prediction]:
        """Predict for images (H, W, 3) of uint8, BGR, all of one size unless ``mixed_sizes``."""
        samples = self.samples(list(images))
        return [self.prediction(image, sample) for image, sample in zip(images, samples)]

    def samples(self, images: List[np.ndarray]) -> List[Any]:
        """Data samples of the toolbox, one per image."""
        return self.inferencer.forward(next(iter(self._preprocess(images))))

    @abstractmethod
    def prediction(self, image: np.ndarray, sample: Any) -> Prediction:
        """Result and drawing of one image."""

    def _preprocess(self, images: List[np.ndarray]) -> Iterable[Any]:
        return self.inferencer.preprocess(images, batch_size=len(images))

    def _draw(self, image: np.ndarray, sample: Any, **settings: Any) -> np.ndarray:
        # The inferencers draw arrays in the order of their channels, with colours in RGB.
        drawings = self.inferencer.visualize(
            [np.ascontiguousarray(image[..., ::-1])], [sample], return_vis=True, **settings
        )
        return drawings[0][..., ::-1]


class DetectionPredictor(Predictor):
    """mmdet's inferencer; its JSON, with the names of the classes."""

    def __init__(self, cfg: Config, weights: str, device: str, score_thr: float) -> None:
        from mmdet.apis import DetInferencer

        cfg.visualizer = _without_backends(cfg, 'DetLocalVisualizer')
        self.inferencer = DetInferencer(cfg, weights, device=device)
        self.score_thr = score_thr
        self.classes = self.inferencer.model.dataset_meta.get('classes')

    def _preprocess(self, images: List[np.ndarray]) -> Iterable[Any]:
        return (data for _, data in super()._preprocess(images))

    def prediction(self, image: np.ndarray, sample: Any) -> Prediction:
        drawing = self._draw(image, sample, pred_score_thr=self.score_thr)
        result = self.inferencer.pred2dict(sample)
        if self.classes is not None:
            result['label_names'] = [self.classes[label] for label in result['labels']]
        return Prediction(result, drawing)


class SegmentationPredictor(Predictor):
    """mmseg's inferencer; each class's share of the pixels as JSON, beside the label image."""

    def __init__(self, cfg: Config, weights: str, device: str, _score_thr: float) -> None:
        from mmseg.apis import MMSegInferencer

        cfg.visualizer = _without_backends(cfg, 'SegLocalVisualizer')
        self.inferencer = MMSegInferencer(cfg, weights, device=device)
        # mmseg's own sorts all pixels in Python, which takes seconds for each large picture.
        self.inferencer.visualizer._get_center_loc = centre_of_largest_row
        self.classes = self.inferencer.model.dataset_meta['classes']

    def prediction(self, image: np.ndarray, sample: Any) -> Prediction:
        labels = sample.pred_sem_seg.data[0].cpu().numpy()
        labels = labels.astype(np.uint8 if labels.max() < 256 else np.uint16)
        found = zip(*np.unique(labels, return_counts=True))
        classes = [
            dict(label=int(label), name=self.classes[label], share=round(count / labels.size, 6))
            for label, count in found
        ]
        drawing = self._draw(image, sample, opacity=0.5)  # the picture stays visible
        return Prediction(dict(classes=classes), drawing, labels)


class ClassificationPredictor(Predictor):
    """mmpretrain's inferencer and its results."""

    mixed_sizes = True  # the pipelines end in one size

    def __init__(self, cfg: Config, weights: str, device: str, _score_thr: float) -> None:
        from mmpretrain.apis import ImageClassificationInferencer
        from mmpretrain.visualization import UniversalVisualizer

        self.inferencer = ImageClassificationInferencer(cfg, weights, device=device)
        self.inferencer.visualizer = UniversalVisualizer()

    def prediction(self, image: np.ndarray, sample: Any) -> Prediction:
        # The inferencer's own `visualize` draws into windows and files only.
        drawing = self.inferencer.visualizer.visualize_cls(
            np.ascontiguousarray(image[..., ::-1]),
            sample,
            classes=self.inferencer.classes,
            draw_gt=False,
        )
        result = self.inferencer.postprocess([sample], None)[0]
        result['pred_scores'] = result['pred_scores'].tolist()
        return Prediction(result, drawing[..., ::-1])


PREDICTORS = dict(
    mmdet=DetectionPredictor, mmpretrain=ClassificationPredictor, mmseg=SegmentationPredictor
)


def build_predictor(
    cfg: Config,
    checkpoint: dict,
    source: str,
    device: Optional[str] = None,
    score_thr: float = 0.3,
    deploy: bool = False,
) -> Predictor:
    """Build the inferencer of an experiment.

    Args:
        cfg: The experiment's config.
        checkpoint: What :func:`~mmlinglo.utils.load_checkpoint_file` returned.
        source: Name of the checkpoint for error messages.
        device: Such as ``'cpu'`` or ``'cuda:0'``; None for the first accelerator, else the CPU.
        score_thr: Score above which boxes and masks are drawn; the results hold all.
        deploy: Whether to re-parameterise the model.

    Raises:
        CheckpointError: If the weights are another model's.
        ValueError: If the config is of no toolbox or has no test pipeline, a segmentor's
            classes have no names, or nothing can be re-parameterised.
    """
    if cfg.default_scope not in PREDICTORS:
        raise ValueError(
            f'default_scope must be one of {sorted(PREDICTORS)}, got {cfg.default_scope!r}'
        )
    if 'pipeline' not in (cfg.get('test_dataloader') or {}).get('dataset', {}):
        raise ValueError('it has no test_dataloader.dataset.pipeline, which prepares the images')
    model = build_model(cfg).eval()
    if deploy and not any(hasattr(module, 'switch_to_deploy') for module in model.modules()):
        raise ValueError('the model has no part that can be re-parameterised: leave out --deploy')
    load_model_weights(model, checkpoint, source)
    meta = dataset_meta(cfg, checkpoint)
    if cfg.default_scope == 'mmseg' and not meta.get('classes'):
        raise ValueError(
            f'neither {source!r} nor the config names the classes: '
            'set test_dataloader.dataset.metainfo'
        )
    # The inferencers take files: this one is known to be safe and to fit.
    with tempfile.TemporaryDirectory() as folder:
        weights = os.path.join(folder, 'weights.pth')
        torch.save(dict(meta=dict(dataset_meta=meta), state_dict=model.state_dict()), weights)
        predictor = PREDICTORS[cfg.default_scope](
            copy.deepcopy(cfg), weights, device or get_device(), score_thr
        )
    if deploy:
        switch_to_deploy(predictor.inferencer.model)
    return predictor


def dataset_meta(cfg: Config, checkpoint: dict) -> dict:
    """Names and colours of the classes: the checkpoint's, else those of the config's test data."""
    stored = (checkpoint.get('meta') or {}).get('dataset_meta')
    meta = {}
    if isinstance(stored, dict):
        meta = {str(key).lower(): value for key, value in stored.items()}
    if not meta.get('classes') or not isinstance(meta['classes'], (list, tuple)):
        dataset = copy.deepcopy(cfg.test_dataloader.dataset)
        dataset.lazy_init = True  # the data themselves are not needed
        meta = dict(DATASETS.build(dataset).metainfo)
    return meta


def list_files(folder: Path, skip: Sequence[Path] = ()) -> Iterator[str]:
    """Names of all files in a folder and its sub-folders, relative to it, sorted in each.

    Links to folders are followed, but no folder is visited twice. Hidden files and folders are
    left out.

    Args:
        folder: Where to look.
        skip: Folders to leave out.
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


def is_picture(name: str) -> bool:
    """Whether the name has the suffix of a picture that OpenCV can read and write."""
    return name.lower().endswith(PICTURE_SUFFIXES)


def is_video(name: str) -> bool:
    """Whether the name has the suffix of a video."""
    return name.lower().endswith(VIDEO_SUFFIXES)


def read_picture(path: Path) -> np.ndarray:
    """Read a picture as mmcv does for the toolboxes: 8-bit BGR, turned upright, without alpha.

    Returns:
        The image, (H, W, 3) of uint8.

    Raises:
        UnreadableError: If the file is missing, empty, cut off, or no picture.
    """
    if not path.is_file():
        raise UnreadableError('not a regular file' if path.exists() else 'no such file')
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UnreadableError(error.strerror) from error
    if not content:
        raise UnreadableError('the file is empty')
    if content.startswith(b'\xff\xd8'):
        _check_jpeg_is_whole(content)
    try:
        image = mmcv.imfrombytes(content, flag='color')
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
        batch_size: How many pictures go through the model together; fewer if they differ in
            size and the model would pad them.

    Yields:
        Name of each picture and None, or what was wrong with it.

    Raises:
        ValueError: If a name leads out of the folder.
    """
    batch: List[Tuple[str, np.ndarray]] = []
    for name in names:
        if os.path.isabs(name) or '..' in PurePath(name).parts:
            raise ValueError(f'names must stay within the folder, got {name!r}')
        try:
            image = read_picture(folder / name)
        except UnreadableError as error:
            yield name, str(error)
            continue
        fits = predictor.mixed_sizes or not batch or batch[0][1].shape == image.shape
        if batch and (len(batch) == batch_size or not fits):
            yield from _annotate_batch(predictor, batch, out_dir)
            batch = []
        batch.append((name, image))
    if batch:
        yield from _annotate_batch(predictor, batch, out_dir)


def open_video(path: Path) -> mmcv.VideoReader:
    """Open a video.

    Raises:
        UnreadableError: If OpenCV cannot read it.
    """
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
    more than a few frames are in memory.

    Args:
        predictor: The model.
        reader: The video.
        name: Name of the results.
        out_dir: Folder for the results.
        batch_size: How many frames go through the model together.

    Yields:
        Numbers of the frames done, from 0.

    Raises:
        UnreadableError: If there are no frames or they change in size; nothing but label images
            is left then. Also if more than a second is missing at the end, after the results
            for the rest are written.
    """
    rate = reader.fps if math.isfinite(reader.fps) and reader.fps > 0 else DEFAULT_FRAME_RATE
    code, suffix = writable_video_format()
    drawing_name = name if name.lower().endswith(suffix) else name + suffix
    predictions = out_dir / PREDICTIONS
    done = 0
    writer = cv2.VideoWriter()
    with (
        complete_file(out_dir / DRAWINGS / drawing_name) as video,
        complete_file(predictions / f'{name}.jsonl') as lines,
        lines.open('w') as stream,
    ):
        try:
            images = _frames(reader)
            for batch in iter(lambda: list(islice(images, batch_size)), []):
                for frame, prediction in zip(batch, predictor(batch)):
                    if not done:
                        size = prediction.drawing.shape[1::-1]
                        if not writer.open(str(video), cv2.VideoWriter_fourcc(*code), rate, size):
                            raise UnreadableError(
                                f'OpenCV writes no video of {size[0]} x {size[1]}'
                            )
                    record = dict(frame=done, time=round(done / rate, 6), **_size(frame))
                    record.update(prediction.result)
                    if prediction.labels is not None:
                        record['label_image'] = f'{name}/{done:06d}.png'
                        _write_image(predictions / record['label_image'], prediction.labels)
                    stream.write(json.dumps(record) + '\n')
                    writer.write(np.ascontiguousarray(prediction.drawing))
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


def writable_video_format() -> Tuple[str, str]:
    """Code and suffix of the first of ``VIDEO_FORMATS`` that the installed OpenCV writes.

    Raises:
        RuntimeError: If it writes none.
    """
    with tempfile.TemporaryDirectory() as folder:
        for code, suffix in VIDEO_FORMATS:
            file = os.path.join(folder, f'probe{suffix}')
            writer = cv2.VideoWriter(file, cv2.VideoWriter_fourcc(*code), 25.0, (64, 64))
            opened = writer.isOpened()
            writer.release()
            if opened:
                return code, suffix
    raise RuntimeError(
        f'OpenCV {cv2.__version__} writes none of {[code for code, _ in VIDEO_FORMATS]}: '
        'install opencv-python, which has FFmpeg inside'
    )


def centre_of_largest_row(mask: np.ndarray) -> np.ndarray:
    """Where mmseg writes the name of a class: the middle pixel of the row with most of its pixels.

    Args:
        mask: Ones where the class is, (H, W), at least one.

    Returns:
        Column and row.
    """
    row = np.count_nonzero(mask == 1, axis=1).argmax()
    columns = np.flatnonzero(mask[row] == 1)
    return np.array([columns[len(columns) // 2], row])


def _without_backends(cfg: Config, default: str) -> dict:
    settings = dict(cfg.get('visualizer') or dict(type=default))
    for key in ('vis_backends', 'save_dir'):
        settings.pop(key, None)
    return settings


def _check_jpeg_is_whole(content: bytes) -> None:
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


def _annotate_batch(
    predictor: Predictor, batch: List[Tuple[str, np.ndarray]], out_dir: Path
) -> Iterator[Tuple[str, Optional[str]]]:
    try:
        predictions = predictor([image for _, image in batch])
    except Exception as error:  # any: the other pictures are to be done
        if len(batch) > 1:
            for item in batch:
                yield from _annotate_batch(predictor, [item], out_dir)
        else:
            yield batch[0][0], f'{type(error).__name__}: {error}'.splitlines()[0]
        return
    for (name, image), prediction in zip(batch, predictions):
        record = dict(input=name, **_size(image), **prediction.result)
        if prediction.labels is not None:
            # beside the JSON file, by which sub-folders do not matter
            record['label_image'] = f'{os.path.basename(name)}.png'
            _write_image(out_dir / PREDICTIONS / f'{name}.png', prediction.labels)
        with complete_file(out_dir / PREDICTIONS / f'{name}.json') as file:
            file.write_text(json.dumps(record))
        drawing_name = name if is_picture(name) else f'{name}.jpg'
        _write_image(out_dir / DRAWINGS / drawing_name, prediction.drawing)
        yield name, None


def _size(image: np.ndarray) -> Dict[str, int]:
    return dict(height=image.shape[0], width=image.shape[1])


def _frames(reader: mmcv.VideoReader) -> Iterator[np.ndarray]:
    shape = None
    for frame in reader:
        shape = shape or frame.shape
        if frame.shape != shape:
            raise UnreadableError('its frames change in size')
        yield frame


def _write_image(path: Path, image: np.ndarray) -> None:
    with complete_file(path) as file:
        mmcv.imwrite(np.ascontiguousarray(image), str(file))

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The data sets of a config, and their images."""

import codecs
import copy
import io
import os.path as osp
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, TextIO, Tuple

import mmcv
import numpy as np
from mmengine.config import Config
from mmengine.dataset import BaseDataset, Compose
from mmengine.fileio import LocalBackend
from mmengine.registry import DATASETS
from mmengine.utils import track_parallel_progress, track_progress
from PIL import Image

from mmlinglo.utils.cli import leaf_datasets, type_name

from .checks import Report

PICTURE_SUFFIXES = (
    *('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm', '.pgm'),
    *('.gif', '.heic', '.avif', '.jp2'),
)


@dataclass
class Split:
    """One data set of a config.

    Attributes:
        name: ``train``, ``val``, ``test``, or ``val, test`` if both are the same.
        loader: Settings of its data loader.
        cfg: Settings of the data set, without wrappers such as RepeatDataset.
        evaluators: Settings of the metrics that use it, with their names in the config.
        dataset: The data set. Its paths are complete, but it has loaded no annotations.
        classes: Names of its classes; empty while they are unknown.
        report: Report that gets the findings.
        samples: What its pipeline gets, as far as the images need it; None if unknown.
        used: Ids of the samples that training or evaluation gets; None if unknown.
    """

    name: str
    loader: dict
    cfg: dict
    evaluators: List[Tuple[str, dict]]
    dataset: BaseDataset
    classes: Sequence[str]
    report: Report
    samples: Optional[List[dict]] = None
    used: Optional[Sequence] = None

    @property
    def training(self) -> bool:
        return self.name.startswith('train')

    def add(self, check: str, place: str) -> None:
        """Report a defect of this data set."""
        self.report.add(check, self.name, place)

    def count(self, **numbers: int) -> None:
        """Note numbers, such as those of images and boxes, for the head of the report."""
        self.report.datasets[self.name].update(numbers, classes=len(self.classes))

    def exists(self, path: str, check: str, test: Callable[[str], bool] = osp.isfile) -> bool:
        """Whether a path is a file, or passes another test. If not, report this."""
        found = test(path)
        if not found:
            self.add(check, path)
        return found

    def step(self, name: str) -> dict:
        """Settings of the first pipeline step of this type; {} if there is none."""
        steps = [step for step in self.cfg.get('pipeline') or [] if isinstance(step, dict)]
        return next((step for step in steps if type_name(step['type']) == name), {})

    def prefix(self, key: str) -> Optional[str]:
        """The folder of the images. If there is none, report this and return None."""
        folder = self.dataset.data_prefix.get(key)
        if folder is None:
            self.add('data-prefix', f'data_prefix = {self.cfg.get("data_prefix")} has no {key!r}')
        elif self.exists(folder, 'folder-missing', lambda path: osp.isdir(path or '.')):
            return folder
        return None

    def read_text(self) -> Optional[str]:
        """Read the annotation file as UTF-8, as training does. If this fails, report it and return None."""
        path = self.dataset.ann_file
        if not self.exists(path, 'annotations-missing'):
            return None
        try:
            data = Path(path).read_bytes()
            if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b'\0' in data[:4]:
                problem = 'the text is UTF-16 or UTF-32: save it as UTF-8'
            elif data.startswith(codecs.BOM_UTF8):
                problem = 'the text starts with a byte-order mark: save it as UTF-8 without one'
            else:
                return data.decode()
        except (OSError, UnicodeDecodeError) as error:
            problem = str(error)
        self.add('annotations-unreadable', f'{path}: {problem}')
        return None

    def load(self, check: str) -> Optional[List[dict]]:
        """Load the samples of the data set. If this fails, report it and return None."""
        try:
            return self.dataset.load_data_list()
        except Exception as error:  # missing or broken files can raise anything
            self.add(check, first_line(error))
            return None

    def transformed_size(self, sample: dict) -> Optional[Tuple[int, int]]:
        """Height and width of a sample after the pipeline; None if the pipeline fails."""
        try:
            return tuple(Compose(self.cfg['pipeline'])(copy.deepcopy(sample))['inputs'].shape[-2:])
        except Exception:  # a damaged file can raise anything; another check reports it
            return None


def find_splits(cfg: Config, report: Report) -> List[Split]:
    """Open the data sets of an experiment, and report those that cannot be checked."""
    groups = [[name] for name in ('train', 'val', 'test') if cfg.get(f'{name}_dataloader')]
    if groups[-2:] == [['val'], ['test']]:
        if cfg.val_dataloader.dataset == cfg.test_dataloader.dataset:
            groups[-2:] = [['val', 'test']]
    splits = []
    for group in groups:
        loader = cfg[f'{group[0]}_dataloader']
        leaves = list(leaf_datasets(loader.dataset))
        keys = [f'{name}_evaluator' for name in group]
        evaluators = [(key, metric) for key in keys for metric in as_list(cfg.get(key))]
        for i, leaf in enumerate(leaves):
            name = ', '.join(group) + (f' {i}' if len(leaves) > 1 else '')
            try:
                dataset = DATASETS.build(dict(leaf, pipeline=[], lazy_init=True))
            except Exception as error:  # the data set's constructor can raise anything
                report.add('dataset-unbuildable', name, f'{leaf.get("type")}: {first_line(error)}')
                continue
            dataset.download = False  # CIFAR10 and others download themselves when they load
            report.datasets[name] = dict(type=type(dataset).__name__)
            classes, palette = (dataset.metainfo.get(key) or () for key in ('classes', 'palette'))
            split = Split(name, loader, leaf, evaluators, dataset, classes, report)
            if isinstance(classes, str):
                split.add('classes-text', repr(classes))
                continue
            if 0 < len(palette) < len(classes):
                split.add('palette-short', f'{len(palette)} colours, {len(classes)} classes')
            splits.append(split)
    return splits


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def as_list(settings: Any) -> List[dict]:
    """List the settings of one part, of several parts or of None."""
    return [settings] if isinstance(settings, dict) else list(settings or [])


class Opened(NamedTuple):
    """What the files of a sample hold.

    Attributes:
        sample: The sample.
        problems: Keys of checks, and places.
        shape: Height and width of the image in pixels; None if it cannot be read.
        labels: Numbers in the label image, and how many pixels have each.
    """

    sample: dict
    problems: List[Tuple[str, str]]
    shape: Optional[Tuple[int, int]]
    labels: Dict[int, int]


Opener = Callable[[Split], List[Opened]]


def open_samples(
    split: Split, num: Optional[int], workers: int, progress: Optional[TextIO]
) -> List[Opened]:
    """Check that all images and label images of a data set exist, and open them in parallel.

    Args:
        split: The data set.
        num: How many to open, evenly spaced; None for all.
        workers: Processes that open them.
        progress: Stream for a progress bar; None for no bar.
    """
    if split.samples is None:
        return []
    if split.used is None:
        split.used = range(len(split.samples))
    there = [
        sample
        for sample in split.samples
        if sample.get('img_path')  # CIFAR10 keeps its images in memory
        and split.exists(sample['img_path'], 'picture-missing')
        and ('seg_map_path' not in sample or split.exists(sample['seg_map_path'], 'label-missing'))
    ]
    if num is not None and len(there) > num:
        there = [there[i] for i in np.linspace(0, len(there) - 1, num).astype(int)]
    step, labels = split.step('LoadImageFromFile'), split.step('LoadAnnotations')
    function = partial(
        inspect_sample,
        flag=step.get('color_type', 'color'),
        backend=step.get('imdecode_backend', 'cv2'),
        label_backend=labels.get('imdecode_backend', 'pillow'),
    )
    file = progress or io.StringIO()
    file.write(f'{split.name}: opening {len(there)} images\n')
    if workers == 1:
        opened = track_progress(function, there, file=file)
    else:
        opened = track_parallel_progress(function, there, workers, chunksize=8, file=file)
    for problem in (problem for each in opened for problem in each.problems):
        split.add(*problem)
    split.count(pictures=len(split.samples), opened=len(opened))
    return opened


def inspect_sample(sample: dict, flag: str, backend: str, label_backend: str) -> Opened:
    """Open the image of a sample, as training does, and its label image, if it has one."""
    path, label_path = sample['img_path'], sample.get('seg_map_path')
    problems: List[Tuple[str, str]] = []
    counts: Dict[int, int] = {}
    data = Path(path).read_bytes()
    image = decode(data, flag, backend)
    shape = None if image is None else image.shape[:2]
    if is_truncated(data):
        problems.append(('picture-truncated', path))
    elif image is None:
        reason = f'{backend} cannot decode it' if data else 'empty file'
        problems.append(('picture-unreadable', f'{path}: {reason}'))
    annotated = (sample.get('height'), sample.get('width'))
    if annotated not in ((None, None), shape) and shape is not None:
        problems.append(('picture-size', f'{path}: {size(shape)}, annotated {size(annotated)}'))
    if label_path is not None:
        labels = decode(Path(label_path).read_bytes(), 'unchanged', label_backend)
        if labels is None:
            place = f'{label_path}: {label_backend} cannot decode it'
            problems.append(('label-unreadable', place))
        elif np.squeeze(labels).ndim != 2:
            problems.append(('label-colours', f'{label_path}: shape {labels.shape}'))
        else:
            labels = np.squeeze(labels)
            counts = Counter(labels.ravel().tolist())
            if shape not in (None, labels.shape):
                place = f'{label_path}: {size(labels.shape)}, {path}: {size(shape)}'
                problems.append(('label-size', place))
    return Opened(sample, problems, shape, counts)


def decode(data: bytes, flag: str, backend: str) -> Optional[np.ndarray]:
    """Decode an image; return None if it is damaged."""
    try:
        return mmcv.imfrombytes(data, flag=flag, backend=backend)
    except Exception:  # whatever the backend raises
        return None


def is_truncated(data: bytes) -> bool:
    """Whether data is missing from an image. OpenCV below 4.12 decodes it anyway."""
    # A format that only OpenCV reads, a very large image, or damage on which Pillow raises anything.
    with suppress(Exception):
        image = Image.open(io.BytesIO(data))
        try:
            image.load()
        except OSError:
            return True
    return False


def list_files(folder: str, recursive: bool = True) -> List[str]:
    """List the names of the files in (and below) a folder, as the toolboxes see them, sorted."""
    return sorted(LocalBackend().list_dir_or_file(folder, list_dir=False, recursive=recursive))


def check_suffixes(split: Split, folder: str, is_read: Callable[[str], bool]) -> None:
    """Report the images in and below a folder that the data set leaves out because of their names."""
    for path in list_files(folder):
        if path.lower().endswith(PICTURE_SUFFIXES) and not is_read(path):
            split.add('picture-suffix', osp.join(folder, path))


def size(shape: Tuple) -> str:
    """Write a size, which is height and width, as width x height."""
    return f'{shape[1]} x {shape[0]}'

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Label images of semantic segmentation.

mmseg reads them as 8-bit numbers; with ``reduce_zero_label`` 0 becomes 255 and
all others but 255 one less. Losses and metrics skip ``ignore_index``, 255 by
default, and the loss accepts no other number outside the classes.
"""

import os.path as osp
from collections import Counter
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

import mmcv
import numpy as np
from mmengine.config import Config
from mmengine.fileio import LocalBackend

from .pictures import Opener, Picture, Problem, decode, existing, loading, other_pictures, size
from .report import Report
from .splits import Split

IGNORED = 255  # mmseg's default, and what reduce_zero_label writes


class Pair(NamedTuple):
    """A picture and the path of its label image, with the backend that decodes it."""

    picture: Picture
    label_path: str
    backend: str


class Labels(NamedTuple):
    """What a label image holds: numbers and how many pixels have each."""

    path: str
    counts: Dict[int, int]


class Reading(NamedTuple):
    """How numbers in the label images become classes.

    Attributes:
        num_classes: Classes that the label images know.
        reduce_zero_label: As mmseg's.
        label_map: Class of the label images to class of the model, if the
            config has chosen some of them.
        ignore_index: Number that losses skip.
    """

    num_classes: int
    reduce_zero_label: bool
    label_map: Optional[Dict[int, int]]
    ignore_index: int

    def class_of(self, number: int) -> Optional[int]:
        """Class of a number in a label image, ``ignore_index``, or None if it is neither."""
        if number > 255:
            return None
        if self.reduce_zero_label:
            number = IGNORED if number in (0, IGNORED) else number - 1
        if number == self.ignore_index:
            return number
        if number >= self.num_classes:
            return None
        return number if self.label_map is None else self.label_map[number]


def check(cfg: Config, splits: List[Split], report: Report, opener: Opener) -> None:
    """Check data sets of mmseg.

    Args:
        cfg: The experiment.
        splits: Its data sets.
        report: Findings go here.
        opener: Opens pictures and label images.
    """
    ignore_index = check_ignore_index(cfg, splits, report)
    check_reduce_zero_label(splits, report)
    opened: Dict[str, List[Labels]] = {}
    for split in splits:
        pairs = find_pairs(split, report)
        results = opener.run(inspect_pair, pairs, split.name)
        for problems, _ in results:
            for key, place in problems:
                report.add(key, split.name, place)
        opened[split.name] = [labels for _, labels in results if labels is not None]
        report.datasets[split.name].update(opened=len(results), classes=len(split.classes or ()))
    everything = [labels for name in opened for labels in opened[name]]
    for split in splits:
        if split.classes and opened[split.name]:
            check_labels(split, opened[split.name], everything, ignore_index, report)


def check_ignore_index(cfg: Config, splits: List[Split], report: Report) -> int:
    """The number that is ignored in training, which must be that of the metrics and the padding."""
    places = {}
    for key in ('decode_head', 'auxiliary_head'):
        heads = cfg.model.get(key) or []
        for head in [heads] if isinstance(heads, dict) else heads:
            places.setdefault(f'model.{key}.ignore_index', head.get('ignore_index', IGNORED))
    ignore_index = places.get('model.decode_head.ignore_index', IGNORED)
    for split in splits:
        for name, evaluator in split.evaluators:
            places[f'{name}.ignore_index'] = evaluator.get('ignore_index', IGNORED)
        if split.dataset.reduce_zero_label:
            places['reduce_zero_label=True, which writes'] = IGNORED
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    places['data_preprocessor.seg_pad_val'] = preprocessor.get('seg_pad_val', IGNORED)
    if len(set(places.values())) > 1:
        report.add(
            'ignore-index', 'config', ', '.join(f'{key} {value}' for key, value in places.items())
        )
    return ignore_index


def check_reduce_zero_label(splits: List[Split], report: Report) -> None:
    """All places that say whether label 0 is dropped agree."""
    places = {}
    for split in splits:
        places[f'data set of {split.name}'] = split.dataset.reduce_zero_label
        explicit = split.step('LoadAnnotations').get('reduce_zero_label')
        if explicit is not None:
            places[f'LoadAnnotations of {split.name}'] = explicit
    if len(set(places.values())) > 1:
        place = ', '.join(f'{key}: {value}' for key, value in places.items())
        report.add('zero-label-differs', 'config', place)


def find_pairs(split: Split, report: Report) -> List[Pair]:
    """Pictures with their label images; what is missing is reported."""
    dataset = split.dataset
    folders = [dataset.data_prefix.get(key) for key in ('img_path', 'seg_map_path')]
    missing = [folder for folder in folders if folder is not None and not osp.isdir(folder)]
    for folder in missing:
        report.add('folder-missing', split.name, folder)
    if dataset.ann_file and not osp.exists(dataset.ann_file):
        report.add('annotations-missing', split.name, dataset.ann_file)
        return []
    if missing:
        return []
    samples = dataset.load_data_list()
    split.num_samples = len(samples)
    if not dataset.ann_file:
        for path in other_pictures(folders[0], (dataset.img_suffix,)):
            report.add('picture-suffix', split.name, osp.join(folders[0], path))
    if not samples:
        place = f'{folders[0]}: no file ends in {dataset.img_suffix!r}'
        report.add('pictures-none', split.name, place)
    report.datasets[split.name].update(pictures=len(samples))
    pictures = existing(split, [s['img_path'] for s in samples], 'picture-missing', report)
    samples = [s for s in samples if s['img_path'] in pictures and 'seg_map_path' in s]
    labels = existing(split, [s['seg_map_path'] for s in samples], 'label-missing', report)
    if not dataset.ann_file and folders[1] is not None:
        files = LocalBackend().list_dir_or_file(
            folders[1], list_dir=False, suffix=dataset.seg_map_suffix, recursive=True
        )
        for path in sorted({osp.join(folders[1], file) for file in files} - labels):
            report.add('label-unused', split.name, path)
    backend = split.step('LoadAnnotations').get('imdecode_backend', 'pillow')
    return [
        Pair(Picture(s['img_path'], **loading(split)), s['seg_map_path'], backend)
        for s in samples
        if s['seg_map_path'] in labels
    ]


def inspect_pair(pair: Pair) -> Tuple[List[Problem], Optional[Labels]]:
    """Open a picture and its label image.

    Returns:
        What is wrong with them, and what the label image holds, None if it
        cannot be read.
    """
    problems, shape = decode(pair.picture)
    path = pair.label_path
    try:
        image = mmcv.imfrombytes(Path(path).read_bytes(), flag='unchanged', backend=pair.backend)
    except Exception as error:  # whatever the backend raises for a damaged file
        return [*problems, ('label-unreadable', f'{path}: {type(error).__name__}')], None
    if image is None:
        return [*problems, ('label-unreadable', f'{path}: no picture')], None
    image = np.squeeze(image)
    if image.ndim != 2:
        return [*problems, ('label-colours', f'{path}: shape {image.shape}')], None
    if shape is not None and image.shape != shape:
        place = f'{path}: {size(image.shape)}, {pair.picture.path}: {size(shape)}'
        problems.append(('label-size', place))
    numbers, counts = np.unique(image.astype(np.int64), return_counts=True)
    return problems, Labels(path, dict(zip(numbers.tolist(), counts.tolist())))


def check_labels(
    split: Split,
    opened: List[Labels],
    everything: List[Labels],
    ignore_index: int,
    report: Report,
) -> None:
    """Numbers in the label images against the classes.

    Args:
        split: Data set.
        opened: Its label images.
        everything: Those of all data sets of the experiment: a number that is
            rare must not look like one that is not used.
        ignore_index: Number that training skips.
        report: Findings go here.
    """
    dataset, name = split.dataset, split.name
    known = dataset.METAINFO['classes'] if dataset.label_map else split.classes
    reading = Reading(len(known), bool(dataset.reduce_zero_label), dataset.label_map, ignore_index)
    seen = {number for labels in everything for number in labels.counts}
    if IGNORED in seen and seen <= {0, IGNORED} and ignore_index == IGNORED:
        report.add('label-binary', name, f'{opened[0].path} and all others')
        return
    numbers = {n for n in seen if n != (IGNORED if reading.reduce_zero_label else ignore_index)}
    largest = max(numbers, default=0)
    shifted = 0 < largest == reading.num_classes and not reading.reduce_zero_label
    if shifted:
        place = next((labels.path for labels in opened if largest in labels.counts), None)
        if place is not None:
            facts = f'numbers {min(numbers)} to {largest}, {reading.num_classes} classes'
            report.add('zero-label-kept', name, f'{place}: {facts}')
    if reading.reduce_zero_label and 0 in numbers and 0 < largest == reading.num_classes - 1:
        place = next((labels.path for labels in opened if 0 in labels.counts), None)
        if place is not None:
            share = sum(labels.counts.get(0, 0) for labels in opened)
            share /= sum(sum(labels.counts.values()) for labels in opened)
            facts = (
                f'numbers 0 to {largest}, {reading.num_classes} classes, 0 in {share:.0%} of pixels'
            )
            report.add('zero-label-dropped', name, f'{place}: {facts}')

    total: Counter = Counter()
    for labels in opened:
        classes = {number: reading.class_of(number) for number in labels.counts}
        outside = [n for n, c in classes.items() if c is None and not (shifted and n == largest)]
        if outside:
            pixels = sum(labels.counts[number] for number in outside)
            report.add('label-range', name, f'{labels.path}: {outside} in {pixels} pixels')
        if set(classes.values()) == {ignore_index}:
            report.add('labels-none', name, labels.path)
        total.update({classes[number]: count for number, count in labels.counts.items()})
    if split.training:
        for i, class_name in enumerate(split.classes):
            if not total[i]:
                report.add(
                    'class-unseen', name, f'{class_name!r}: no pixel in {len(opened)} label images'
                )

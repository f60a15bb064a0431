# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Check label images of semantic segmentation.

mmseg reads them as 8-bit numbers. With ``reduce_zero_label``, 0 becomes 255, 255 stays, and all
other numbers decrease by one. Losses and metrics skip ``ignore_index``, 255 by default. The loss
accepts no other number outside the classes.
"""

import os.path as osp
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Set, Tuple

import mmcv
import numpy as np
from mmengine.config import Config
from mmengine.fileio import LocalBackend

from .pictures import (
    Opener,
    Picture,
    Problem,
    Shape,
    decode,
    existing,
    loading,
    other_pictures,
    size,
)
from .splits import Split

IGNORED = 255  # mmseg's default, and what reduce_zero_label writes


class Pair(NamedTuple):
    """A sample of mmseg, its image, and the backend that decodes its label image."""

    sample: dict
    picture: Picture
    backend: str


class Labels(NamedTuple):
    """The numbers in a label image, and how many pixels have each."""

    path: str
    counts: Dict[int, int]


class Reading(NamedTuple):
    """How numbers in the label images become classes.

    Attributes:
        num_classes: Number of classes in the label images.
        reduce_zero_label: As mmseg's.
        label_map: Maps classes of the label images to classes of the model, if the config
            selects some of them.
        ignore_index: Number that losses skip.
    """

    num_classes: int
    reduce_zero_label: bool
    label_map: Optional[Dict[int, int]]
    ignore_index: int

    def class_of(self, number: int) -> Optional[int]:
        """Map a number in a label image to its class, to ``ignore_index``, or to None if it is neither."""
        if number > 255:
            return None
        if self.reduce_zero_label:
            number = IGNORED if number in (0, IGNORED) else number - 1
        if number == self.ignore_index:
            return number
        if number >= self.num_classes:
            return None
        return number if self.label_map is None else self.label_map[number]


def check(cfg: Config, splits: List[Split], opener: Opener) -> None:
    """Check data sets of mmseg."""
    ignore_index = check_agreement(cfg, splits)
    opened: Dict[str, List[Labels]] = {}
    for split in splits:
        pairs = find_pairs(split)
        results = opener.run(inspect_pair, pairs, split.name)
        for problems, _, _ in results:
            for key, place in problems:
                split.add(key, place)
        opened[split.name] = [labels for _, labels, _ in results if labels is not None]
        split.count(opened=len(results))
        check_inputs(cfg, split, {shape: sample for _, _, (shape, sample) in results if shape})
    seen = {n for several in opened.values() for labels in several for n in labels.counts}
    for split in splits:
        check_labels(split, opened[split.name], seen, ignore_index)


def check_agreement(cfg: Config, splits: List[Split]) -> int:
    """Check that all places agree on dropping label 0, and on the label that training ignores.

    Returns:
        The ignored label.
    """
    zero: Dict[str, Any] = {}
    ignored: Dict[str, Any] = {}
    for key in ('decode_head', 'auxiliary_head'):
        heads = cfg.model.get(key) or []
        for head in [heads] if isinstance(heads, dict) else heads:
            ignored.setdefault(f'model.{key}.ignore_index', head.get('ignore_index', IGNORED))
    ignore_index = ignored.get('model.decode_head.ignore_index', IGNORED)
    for split in splits:
        for name, evaluator in split.evaluators:
            ignored[f'{name}.ignore_index'] = evaluator.get('ignore_index', IGNORED)
        zero[f'data set of {split.name}'] = split.dataset.reduce_zero_label
        if split.dataset.reduce_zero_label:
            ignored['reduce_zero_label=True, which writes'] = IGNORED
        explicit = split.step('LoadAnnotations').get('reduce_zero_label')
        if explicit is not None:
            zero[f'LoadAnnotations of {split.name}'] = explicit
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    ignored['data_preprocessor.seg_pad_val'] = preprocessor.get('seg_pad_val', IGNORED)
    for check, places, colon in (('zero-label-differs', zero, ':'), ('ignore-index', ignored, '')):
        if len(set(places.values())) > 1:
            place = ', '.join(f'{key}{colon} {value}' for key, value in places.items())
            splits[0].report.add(check, 'config', place)
    return ignore_index


def find_pairs(split: Split) -> List[Pair]:
    """Find the images with their label images, and report what is missing."""
    dataset = split.dataset
    folders = [split.prefix('img_path'), dataset.data_prefix.get('seg_map_path')]
    missing = [folder for folder in folders if folder is not None and not osp.isdir(folder)]
    for folder in missing:
        split.add('folder-missing', folder)
    if dataset.ann_file and not osp.exists(dataset.ann_file):
        split.add('annotations-missing', dataset.ann_file)
        return []
    if dataset.ann_file and not split.can_read(dataset.ann_file):
        return []
    if missing or folders[0] is None:
        return []
    samples = split.load('annotations-unreadable')
    if samples is None:
        return []
    if not dataset.ann_file:
        for path in other_pictures(folders[0], (dataset.img_suffix,)):
            split.add('picture-suffix', path)
    if not samples:
        split.add('pictures-none', f'{folders[0]}: no file ends in {dataset.img_suffix!r}')
    split.count(pictures=len(samples))
    pictures = existing(split, [s['img_path'] for s in samples], 'picture-missing')
    samples = [s for s in samples if s['img_path'] in pictures and 'seg_map_path' in s]
    labels = existing(split, [s['seg_map_path'] for s in samples], 'label-missing')
    if not dataset.ann_file and folders[1] is not None:
        files = LocalBackend().list_dir_or_file(
            folders[1], list_dir=False, suffix=dataset.seg_map_suffix, recursive=True
        )
        for path in sorted({osp.join(folders[1], file) for file in files} - labels):
            split.add('label-unused', path)
    backend = split.step('LoadAnnotations').get('imdecode_backend', 'pillow')
    return [
        Pair(s, Picture(s['img_path'], **loading(split)), backend)
        for s in samples
        if s['seg_map_path'] in labels
    ]


def inspect_pair(
    pair: Pair,
) -> Tuple[List[Problem], Optional[Labels], Tuple[Optional[Shape], dict]]:
    """Open an image and its label image.

    Returns:
        What is wrong with them; the content of the label image, None if it cannot be read; and
        the size of the image, None if something is wrong, with the sample.
    """
    problems, shape = decode(pair.picture)
    path = pair.sample['seg_map_path']
    image, reason = None, 'not an image'
    try:
        image = mmcv.imfrombytes(Path(path).read_bytes(), flag='unchanged', backend=pair.backend)
    except Exception as error:  # whatever the backend raises for a damaged file
        reason = type(error).__name__
    if image is None:
        return [*problems, ('label-unreadable', f'{path}: {reason}')], None, (None, pair.sample)
    image = np.squeeze(image)
    if image.ndim != 2:
        problem = ('label-colours', f'{path}: shape {image.shape}')
        return [*problems, problem], None, (None, pair.sample)
    if shape is not None and image.shape != shape:
        place = f'{path}: {size(image.shape)}, {pair.picture.path}: {size(shape)}'
        problems.append(('label-size', place))
    numbers, counts = np.unique(image.astype(np.int64), return_counts=True)
    labels = Labels(path, dict(zip(numbers.tolist(), counts.tolist())))
    return problems, labels, (None if problems else shape, pair.sample)


def check_inputs(cfg: Config, split: Split, samples: Dict[Shape, dict]) -> None:
    """Check the network's inputs: one size per batch, and no image smaller than the sliding window.

    Args:
        cfg: The experiment.
        split: Data set.
        samples: One sample for each image size.
    """
    if split.training:
        sizes = [split.transformed_size(sample) for sample in list(samples.values())[:1]]
        preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
        padded = preprocessor.get('size') or (0, 0)
        split.input_size = next((tuple(map(max, s, padded)) for s in sizes if s), None)
        return
    test_cfg = cfg.model.get('test_cfg') or {}
    crop, stride = test_cfg.get('crop_size'), test_cfg.get('stride')
    if test_cfg.get('mode') == 'slide':
        fits = is_pair(crop) and is_pair(stride) and stride[0] <= crop[0] and stride[1] <= crop[1]
        if not fits:
            split.add('slide-window', f'model.test_cfg: crop_size = {crop}, stride = {stride}')
            crop = None
    else:
        crop = None
    batch_size = split.loader.get('batch_size', 1)
    if crop is None and batch_size == 1:
        return
    results: Dict[Shape, dict] = {}
    for sample in samples.values():
        shape = split.transformed_size(sample)
        if shape is not None:
            results.setdefault(shape, sample)
    places = [f'{sample["img_path"]}: {size(shape)}' for shape, sample in results.items()]
    if batch_size > 1 and len(results) > 1:
        split.add('batch-shapes', f'batch_size = {batch_size}, {places[0]}, {places[1]}')
    for shape, place in zip(results, places):
        if crop is not None and (shape[0] < crop[0] or shape[1] < crop[1]):
            split.add('slide-small', f'{place}, crop_size {size(crop)}')


def is_pair(value: Any) -> bool:
    """Whether a value is two positive numbers of pixels."""
    is_list = isinstance(value, (list, tuple)) and len(value) == 2
    return is_list and all(isinstance(number, int) and number > 0 for number in value)


def check_labels(split: Split, opened: List[Labels], seen: Set[int], ignore_index: int) -> None:
    """Compare the numbers in the label images with the classes.

    Args:
        split: Data set.
        opened: Its label images.
        seen: Numbers in the label images of all data sets of the experiment, so that a rare
            number does not look unused.
        ignore_index: Number that training skips.
    """
    if not split.classes or not opened:
        return
    dataset = split.dataset
    known = dataset.METAINFO['classes'] if dataset.label_map else split.classes
    classes, reduced = len(known), bool(dataset.reduce_zero_label)
    reading = Reading(classes, reduced, dataset.label_map, ignore_index)
    if IGNORED in seen and seen <= {0, IGNORED} and ignore_index == IGNORED:
        split.add('label-binary', f'{opened[0].path} and all others')
        return
    numbers = seen - {IGNORED if reduced else ignore_index}
    largest = max(numbers, default=0)
    shifted = 0 < largest == classes and not reduced
    with_largest = [labels for labels in opened if largest in labels.counts]
    if shifted and with_largest:
        facts = f'numbers {min(numbers)} to {largest}, {classes} classes'
        split.add('zero-label-kept', f'{with_largest[0].path}: {facts}')
    with_zero = [labels for labels in opened if 0 in labels.counts]
    if reduced and with_zero and 0 < largest == classes - 1:
        zeros = sum(labels.counts[0] for labels in with_zero)
        share = zeros / sum(sum(labels.counts.values()) for labels in opened)
        facts = f'numbers 0 to {largest}, {classes} classes, 0 in {share:.0%} of pixels'
        split.add('zero-label-dropped', f'{with_zero[0].path}: {facts}')
    total: Counter = Counter()
    for labels in opened:
        found = {number: reading.class_of(number) for number in labels.counts}
        outside = [n for n, c in found.items() if c is None and not (shifted and n == largest)]
        if outside:
            pixels = sum(labels.counts[number] for number in outside)
            split.add('label-range', f'{labels.path}: {outside} in {pixels} pixels')
        if set(found.values()) == {ignore_index}:
            split.add('labels-none', labels.path)
        for number, count in labels.counts.items():
            total[found[number]] += count
    if split.training:
        for i, name in enumerate(split.classes):
            if not total[i]:
                split.add('class-unseen', f'{name!r}: no pixel in {len(opened)} label images')

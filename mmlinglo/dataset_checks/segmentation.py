# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Check label images of semantic segmentation.

mmseg reads them as 8-bit numbers. With ``reduce_zero_label``, 0 becomes 255, 255 stays, and all
other numbers decrease by one. Losses and metrics skip ``ignore_index``, 255 by default. The loss
accepts no other number outside the classes.
"""

import os.path as osp
from collections import Counter
from typing import Any, Dict, List, Optional, Set, Tuple

import numpy as np
from mmengine.config import Config

from .splits import Opened, Opener, Split, as_list, check_suffixes, list_files, size

IGNORED = 255  # mmseg's default, and what reduce_zero_label writes


def check(cfg: Config, splits: List[Split], open_samples: Opener) -> None:
    """Check data sets of mmseg."""
    ignore_index = check_agreement(cfg, splits)
    opened: Dict[str, List[Opened]] = {}
    for split in splits:
        split.samples = find_samples(split)
        opened[split.name] = open_samples(split)
        if not split.training:
            check_inputs(cfg, split, opened[split.name])
    seen = {number for several in opened.values() for each in several for number in each.labels}
    for split in splits:
        check_labels(split, opened[split.name], seen, ignore_index)


def check_agreement(cfg: Config, splits: List[Split]) -> int:
    """Check that all places agree on dropping label 0, and on the label that training ignores.

    Returns:
        The ignored label.
    """
    heads = [(k, h) for k in ('decode_head', 'auxiliary_head') for h in as_list(cfg.model.get(k))]
    parts = [(f'model.{key}', head) for key, head in heads]
    parts += [part for split in splits for part in split.evaluators]
    ignored = {f'{key}.ignore_index': part.get('ignore_index', IGNORED) for key, part in parts}
    ignore_index = ignored.get('model.decode_head.ignore_index', IGNORED)
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    ignored['data_preprocessor.seg_pad_val'] = preprocessor.get('seg_pad_val', IGNORED)
    zero = {f'data set of {split.name}:': split.dataset.reduce_zero_label for split in splits}
    if any(zero.values()):
        ignored['reduce_zero_label=True, which writes'] = IGNORED
    for split in splits:
        explicit = split.step('LoadAnnotations').get('reduce_zero_label')
        if explicit is not None:
            zero[f'LoadAnnotations of {split.name}:'] = explicit
    for check, places in (('zero-label-differs', zero), ('ignore-index', ignored)):
        if len(set(places.values())) > 1:
            place = ', '.join(f'{key} {value}' for key, value in places.items())
            splits[0].report.add(check, 'config', place)
    return ignore_index


def find_samples(split: Split) -> Optional[List[dict]]:
    """Find the images with their label images, and report what is left out."""
    dataset = split.dataset
    listed = bool(dataset.ann_file) and not osp.isdir(dataset.ann_file)
    folder, labels = split.prefix('img_path'), dataset.data_prefix.get('seg_map_path')
    found = labels is None or split.exists(labels, 'folder-missing', osp.isdir)
    if (listed and split.read_text() is None) or folder is None or not found:
        return None
    samples = split.load('annotations-unreadable')
    if samples is None:
        return None
    if not samples:
        split.add('pictures-none', f'{folder}: no file ends in {dataset.img_suffix!r}')
    if not listed:
        check_suffixes(split, folder, lambda path: path.endswith(dataset.img_suffix))
    if not listed and labels is not None:
        files = (osp.join(labels, file) for file in list_files(labels))
        used = {sample['seg_map_path'] for sample in samples}
        for path in files:
            if path.endswith(dataset.seg_map_suffix) and path not in used:
                split.add('label-unused', path)
    return samples


def check_inputs(cfg: Config, split: Split, opened: List[Opened]) -> None:
    """Check what evaluation reads: one size per batch, and no image smaller than the sliding window."""
    test_cfg = cfg.model.get('test_cfg') or {}
    crop: Any = (0, 0)  # the least size
    if test_cfg.get('mode') == 'slide':
        crop, stride = test_cfg.get('crop_size'), test_cfg.get('stride')
        lengths, steps = np.asarray(crop), np.asarray(stride)
        pairs = all(each.shape == (2,) and each.dtype.kind == 'i' for each in (lengths, steps))
        if not (pairs and np.all(0 < steps) and np.all(steps <= lengths)):
            split.add('slide-window', f'model.test_cfg: crop_size = {crop}, stride = {stride}')
            crop = (0, 0)
    batch_size = split.loader.get('batch_size', 1)
    if crop == (0, 0) and batch_size == 1:
        return
    samples = {each.shape: each.sample for each in opened if each.shape and not each.problems}
    places: Dict[Tuple[int, int], str] = {}
    for sample in samples.values():
        shape = split.transformed_size(sample)
        if shape is not None:
            places.setdefault(shape, f'{sample["img_path"]}: {size(shape)}')
    if batch_size > 1 and len(places) > 1:
        first, second, *_ = places.values()
        split.add('batch-shapes', f'batch_size = {batch_size}, {first}, {second}')
    for shape, place in places.items():
        if shape[0] < crop[0] or shape[1] < crop[1]:
            split.add('slide-small', f'{place}, crop_size {size(crop)}')


def class_numbers(
    num_classes: int, reduce_zero_label: bool, label_map: Optional[dict], ignore_index: int
) -> Dict[int, int]:
    """Map the numbers in label images to classes and ``ignore_index``. Those that are neither are left out.

    Args:
        num_classes: Number of classes in the label images.
        reduce_zero_label: As mmseg's.
        label_map: Maps classes of the label images to classes of the model, if the config
            selects some of them.
        ignore_index: Number that losses skip.
    """
    table = {}
    for number in range(256):
        shifted = number
        if reduce_zero_label:
            shifted = IGNORED if number in (0, IGNORED) else number - 1
        if shifted == ignore_index:
            table[number] = ignore_index
        elif shifted < num_classes:
            table[number] = (label_map or {}).get(shifted, shifted)
    return table


def check_labels(split: Split, opened: List[Opened], seen: Set[int], ignore_index: int) -> None:
    """Compare the numbers in the label images with the classes.

    Args:
        split: Data set.
        opened: Its opened samples.
        seen: Numbers in the label images of all data sets of the experiment, so that a rare
            number does not look unused.
        ignore_index: Number that training skips.
    """
    images = {each.sample['seg_map_path']: each.labels for each in opened if each.labels}
    if not split.classes or not images:
        return
    dataset, reduced = split.dataset, bool(split.dataset.reduce_zero_label)
    classes = len(dataset.METAINFO['classes'] if dataset.label_map else split.classes)
    if IGNORED in seen and seen <= {0, IGNORED} and ignore_index == IGNORED:
        split.add('label-binary', f'{next(iter(images))} and all others')
        return
    numbers = seen - {IGNORED if reduced else ignore_index}
    largest = max(numbers, default=0)
    shifted = 0 < largest == classes and not reduced
    with_number = {number: path for path in reversed(images) for number in images[path]}
    if shifted and largest in with_number:
        facts = f'numbers {min(numbers)} to {largest}, {classes} classes'
        split.add('zero-label-kept', f'{with_number[largest]}: {facts}')
    if reduced and 0 in with_number and 0 < largest == classes - 1:
        pixels = sum(map(Counter, images.values()), Counter())
        share = pixels[0] / sum(pixels.values())
        facts = f'numbers 0 to {largest}, {classes} classes, 0 in {share:.0%} of pixels'
        split.add('zero-label-dropped', f'{with_number[0]}: {facts}')
    table = class_numbers(classes, reduced, dataset.label_map, ignore_index)
    known = {*table, largest} if shifted else {*table}
    for path, labels in images.items():
        outside = [number for number in labels if number not in known]
        if outside:
            count = sum(labels[number] for number in outside)
            split.add('label-range', f'{path}: {outside} in {count} pixels')
        if {table.get(number) for number in labels} == {ignore_index}:
            split.add('labels-none', path)
    if split.training:
        found = {table.get(number) for number in with_number}
        for i, name in enumerate(split.classes):
            if i not in found:
                split.add('class-unseen', f'{name!r}: no pixel in {len(images)} label images')

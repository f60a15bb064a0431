# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Check class folders, and lists of images with class numbers.

mmpretrain numbers the folders in the order of their sorted names and ignores the names of the
classes. It treats each folder as a class, also hidden ones.
"""

import os.path as osp
import re
from io import StringIO
from typing import Dict, List, Optional, Tuple

import numpy as np
from mmengine.config import Config

from .splits import Opener, Split, check_suffixes, list_files


def check(cfg: Config, splits: List[Split], open_samples: Opener) -> None:  # noqa: ARG001
    """Check data sets of mmpretrain."""
    from mmpretrain.datasets import CustomDataset

    folders: Dict[str, List[str]] = {}
    for split in splits:
        if not isinstance(split.dataset, CustomDataset):
            split.samples = split.load('dataset-unbuildable')
            split.classes = split.dataset.metainfo.get('classes') or ()
        elif split.prefix('img_path') is None:
            continue
        elif split.dataset.ann_file:
            split.samples = read_list(split)
        elif split.dataset.with_label:
            folders[split.name], split.samples = read_folders(split)
        else:
            split.samples = split.load('dataset-unbuildable')
        check_unseen(split)
        open_samples(split)
    first = next(iter(folders), '')
    for name, theirs in folders.items():
        if theirs and folders[first] and set(theirs) != set(folders[first]):
            place = differences(theirs, folders[first], f'only in {name}', f'only in {first}')
            splits[0].report.add('folders-differ', name, place)


def read_list(split: Split) -> Optional[List[dict]]:
    """Read the samples of an annotation file: each line has an image and the number of its class."""
    dataset, text = split.dataset, split.read_text()
    if text is None:
        return None
    samples, classes = [], split.classes
    for i, line in enumerate(StringIO(text), start=1):
        place = f'{dataset.ann_file}, line {i}: '
        match = re.fullmatch(r'(.+) (\d+)' if dataset.with_label else '(.+)', line.strip())
        if match is None:
            split.add('line-invalid', f'{place}{line.strip()!r}')
            continue
        sample: dict = dict(img_path=osp.join(dataset.img_prefix, match[1]))
        if dataset.with_label:
            sample['gt_label'] = number = int(match[2])
            if classes and number >= len(classes):
                split.add('class-number', f'{place}class {number}, {len(classes)} classes')
        samples.append(sample)
    return samples


def read_folders(split: Split) -> Tuple[List[str], List[dict]]:
    """Read the class folders and samples of a data set whose classes are folders."""
    from mmpretrain.datasets.custom import find_folders, get_samples

    dataset, root = split.dataset, split.dataset.img_prefix
    folders, numbers = find_folders(root)
    files = list_files(root, recursive=False)
    pictures = [file for file in files if dataset.is_valid_file(file)]
    if not folders:
        facts = f'{len(pictures)} images, no folders' if pictures else 'neither folders nor images'
        split.add('folder-flat' if pictures else 'pictures-none', f'{root}: {facts}')
        return folders, []
    for file in pictures:
        split.add('file-stray', osp.join(root, file))
    samples, empty = get_samples(root, numbers, dataset.is_valid_file)
    for folder in folders:
        if folder.startswith('.'):
            split.add('folder-hidden', osp.join(root, folder))
        elif folder in empty:
            split.add('folder-empty', osp.join(root, folder))
    check_suffixes(split, root, dataset.is_valid_file)
    if split.classes:
        check_names(split, list(split.classes), folders)
    split.classes = split.classes or folders
    return folders, [dict(img_path=osp.join(root, path), gt_label=i) for path, i in samples]


def check_names(split: Split, classes: List[str], folders: List[str]) -> None:
    """Compare the class folders with the classes of the config."""
    root = split.dataset.img_prefix
    if len(folders) != len(classes):
        place = f'{root}: {len(folders)} folders, {len(classes)} classes'
        if set(folders) & set(classes):  # ImageNet's classes and folders have different names
            place += '; ' + differences(folders, classes, 'without a class', 'without a folder')
        split.add('folder-count', place)
    elif folders != classes:
        i = next(i for i, name in enumerate(folders) if name != classes[i])
        place = f'{root}: folder {folders[i]!r} gets the name {classes[i]!r}'
        if set(folders) == set(classes):
            split.add('folder-order', place)
        elif classes != list(split.dataset.METAINFO.get('classes', ())):
            split.add('folder-name', place)


def check_unseen(split: Split) -> None:
    """Check that every class occurs in the training data."""
    if split.training and split.dataset.ann_file:
        samples = split.samples or ()
        numbers = {i for sample in samples for i in np.ravel(sample.get('gt_label', []))}
        for i, name in enumerate(split.classes):
            if numbers and i not in numbers:
                split.add('class-unseen', f'{split.dataset.ann_file}: {name!r}')


def differences(first: List[str], second: List[str], in_first: str, in_second: str) -> str:
    """Describe what only one of two lists has, with the first five names of each."""
    facts = []
    for what, names in ((in_first, {*first} - {*second}), (in_second, {*second} - {*first})):
        if names:
            facts.append(f'{what}: {", ".join(sorted(names)[:5])}' + ' ...' * (len(names) > 5))
    return '; '.join(facts)

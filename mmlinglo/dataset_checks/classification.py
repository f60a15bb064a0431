# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Check class folders, and lists of images with class numbers.

mmpretrain numbers the folders in the order of their sorted names and ignores the names of the
classes. It treats each folder as a class, also hidden ones.
"""

import os.path as osp
from typing import Dict, List, Optional, Tuple

from mmengine.config import Config
from mmengine.fileio import LocalBackend, list_from_file

from .pictures import Opener, Picture, check_pictures, loading, other_pictures
from .splits import Split, first_line


def check(cfg: Config, splits: List[Split], opener: Opener) -> None:  # noqa: ARG001
    """Check data sets of mmpretrain."""
    from mmpretrain.datasets import CustomDataset

    folders: Dict[str, List[str]] = {}
    for split in splits:
        samples: Optional[List[dict]] = None
        if not isinstance(split.dataset, CustomDataset):
            samples = split.load('dataset-unbuildable')
            split.classes = split.dataset.metainfo.get('classes')
        elif split.prefix('img_path') is None:
            continue
        elif split.dataset.ann_file:
            samples = read_list(split)
        elif not osp.isdir(split.dataset.img_prefix):
            split.add('folder-missing', split.dataset.img_prefix)
        elif split.dataset.with_label:
            folders[split.name], samples = read_folders(split)
        else:
            samples = split.load('dataset-unbuildable')
        if samples is None:
            continue
        split.num_samples = len(samples)
        split.count(pictures=len(samples))
        check_numbers(split, samples)
        pictures = [Picture(s['img_path'], **loading(split)) for s in samples if 'img_path' in s]
        if pictures:  # CIFAR10 keeps its images in memory
            check_pictures(split, pictures, opener)
        if split.training:
            sizes = (split.transformed_size(sample) for sample in samples[:3])
            split.input_size = next(filter(None, sizes), None)
    check_same_folders(folders, splits)


def read_list(split: Split) -> Optional[List[dict]]:
    """Read the samples of an annotation file: each line has an image and the number of its class."""
    path, dataset = split.dataset.ann_file, split.dataset
    if not osp.isfile(path):
        split.add('annotations-missing', path)
        return None
    if not split.can_read(path):
        return None
    try:
        lines = list_from_file(path)
    except UnicodeDecodeError as error:
        split.add('annotations-unreadable', f'{path}: {first_line(error)}')
        return None
    samples = []
    for number, line in enumerate(lines, start=1):
        parts = line.strip().rsplit(' ', 1) if dataset.with_label else [line.strip(), '0']
        if len(parts) != 2 or not parts[0] or not parts[1].isdecimal():
            split.add('line-invalid', f'{path}, line {number}: {line!r}')
            continue
        sample = dict(img_path=osp.join(dataset.img_prefix, parts[0]))
        if dataset.with_label:
            sample.update(gt_label=int(parts[1]), place=f'{path}, line {number}')
        samples.append(sample)
    return samples


def read_folders(split: Split) -> Tuple[List[str], List[dict]]:
    """Read the class folders and samples of a data set whose classes are folders."""
    dataset, root, backend = split.dataset, split.dataset.img_prefix, LocalBackend()
    folders = sorted(backend.list_dir_or_file(root, list_file=False))
    files = sorted(backend.list_dir_or_file(root, list_dir=False))
    pictures = [file for file in files if dataset.is_valid_file(file)]
    if not folders:
        if pictures:
            split.add('folder-flat', f'{root}: {len(pictures)} images, no folders')
        else:
            split.add('pictures-none', f'{root}: neither folders nor images')
        return folders, []
    for file in pictures:
        split.add('file-stray', osp.join(root, file))
    samples = []
    for label, folder in enumerate(folders):
        path = osp.join(root, folder)
        names = sorted(backend.list_dir_or_file(path, list_dir=False, recursive=True))
        names = [name for name in names if dataset.is_valid_file(name)]
        if folder.startswith('.'):
            split.add('folder-hidden', path)
        elif not names:
            split.add('folder-empty', path)
        samples += [dict(img_path=osp.join(path, name), gt_label=label) for name in names]
    valid = (*dataset.extensions, *(extension.upper() for extension in dataset.extensions))
    for path in other_pictures(root, valid):
        split.add('picture-suffix', path)
    if split.classes is None:
        split.classes = folders
    else:
        check_names(split, list(split.classes), folders)
    return folders, samples


def check_names(split: Split, classes: List[str], folders: List[str]) -> None:
    """Compare the class folders with the classes of the config."""
    root = split.dataset.img_prefix
    if len(folders) != len(classes):
        place = f'{root}: {len(folders)} folders, {len(classes)} classes'
        if set(folders) & set(classes):  # ImageNet's classes and folders have different names
            place += differences(folders, classes, 'without a class', 'without a folder')
        split.add('folder-count', place)
    elif folders != classes:
        i = next(i for i, name in enumerate(folders) if name != classes[i])
        place = f'{root}: folder {folders[i]!r} gets the name {classes[i]!r}'
        if set(folders) == set(classes):
            split.add('folder-order', place)
        elif classes != list(split.dataset.METAINFO.get('classes', ())):
            split.add('folder-name', place)


def check_numbers(split: Split, samples: List[dict]) -> None:
    """Check that each class number belongs to a class, and that every class occurs in training."""
    numbers = set()
    for sample in samples:
        number = sample.get('gt_label')
        if number is None:
            continue
        numbers.add(int(number))
        if split.classes and not 0 <= number < len(split.classes) and 'place' in sample:
            place = f'{sample["place"]}: class {number}, {len(split.classes)} classes'
            split.add('class-number', place)
    if split.training and numbers and split.dataset.ann_file:
        for i, name in enumerate(split.classes or ()):
            if i not in numbers:
                split.add('class-unseen', f'{split.dataset.ann_file}: {name!r}')


def check_same_folders(folders: Dict[str, List[str]], splits: List[Split]) -> None:
    """Check that evaluation has the same class folders as training."""
    for split in splits:
        first, theirs = next(iter(folders), ''), folders.get(split.name)
        if theirs and folders[first] and set(theirs) != set(folders[first]):
            place = differences(theirs, folders[first], f'only in {split.name}', f'only in {first}')
            split.add('folders-differ', place[2:])


def differences(first: List[str], second: List[str], in_first: str, in_second: str) -> str:
    """Describe what only one of two lists has, with the first five names of each."""
    text = ''
    for what, names in (
        (in_first, set(first) - set(second)),
        (in_second, set(second) - set(first)),
    ):
        if names:
            text += f'; {what}: {", ".join(sorted(names)[:5])}' + ' ...' * (len(names) > 5)
    return text

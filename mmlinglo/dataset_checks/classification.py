# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Class folders, and lists of pictures with class numbers.

mmpretrain numbers the folders in the order of their sorted names, whatever
the names of the classes, and takes each folder for a class, hidden ones too.
"""

import os.path as osp
from typing import Dict, List, Optional, Tuple

from mmengine.config import Config
from mmengine.fileio import LocalBackend, list_from_file

from .pictures import Opener, Picture, check_pictures, loading, other_pictures
from .report import Report
from .splits import Split, first_line


def check(cfg: Config, splits: List[Split], report: Report, opener: Opener) -> None:  # noqa: ARG001
    """Check data sets of mmpretrain.

    Args:
        cfg: The experiment.
        splits: Its data sets.
        report: Findings go here.
        opener: Opens pictures.
    """
    from mmpretrain.datasets import CustomDataset

    folders: Dict[str, List[str]] = {}
    for split in splits:
        if not isinstance(split.dataset, CustomDataset):
            samples = load(split, report)
        elif split.dataset.ann_file:
            samples = read_list(split, report)
        elif not osp.isdir(split.dataset.img_prefix):
            report.add('folder-missing', split.name, split.dataset.img_prefix)
            continue
        elif split.dataset.with_label:
            folders[split.name], samples = read_folders(split, report)
        else:
            samples = load(split, report)
        if samples is None:
            continue
        split.num_samples = len(samples)
        report.datasets[split.name].update(pictures=len(samples), classes=len(split.classes or ()))
        check_numbers(split, samples, report)
        pictures = [Picture(s['img_path'], **loading(split)) for s in samples if 'img_path' in s]
        if pictures:  # CIFAR10 has them in memory
            check_pictures(split, pictures, report, opener)
    check_same_folders(folders, report)


def load(split: Split, report: Report) -> Optional[List[dict]]:
    """Samples of a data set that is not made of folders or a list, such as CIFAR10."""
    try:
        samples = split.dataset.load_data_list()
    except Exception as error:  # whatever it raises for missing or broken files
        report.add('dataset-unbuildable', split.name, first_line(error))
        return None
    split.classes = split.dataset.metainfo.get('classes')
    return samples


def read_list(split: Split, report: Report) -> Optional[List[dict]]:
    """Samples of an annotation file: a picture and the number of its class in each line."""
    path, dataset = split.dataset.ann_file, split.dataset
    if not osp.isfile(path):
        report.add('annotations-missing', split.name, path)
        return None
    samples = []
    for number, line in enumerate(list_from_file(path), start=1):
        parts = line.strip().rsplit(' ', 1) if dataset.with_label else [line.strip(), '0']
        if len(parts) != 2 or not parts[0] or not parts[1].isdecimal():
            report.add('line-invalid', split.name, f'{path}, line {number}: {line!r}')
            continue
        sample = dict(img_path=osp.join(dataset.img_prefix, parts[0]))
        if dataset.with_label:
            sample.update(gt_label=int(parts[1]), place=f'{path}, line {number}')
        samples.append(sample)
    return samples


def read_folders(split: Split, report: Report) -> Tuple[List[str], List[dict]]:
    """Class folders and samples of a data set whose classes are folders."""
    dataset, root = split.dataset, split.dataset.img_prefix
    backend = LocalBackend()
    folders = sorted(backend.list_dir_or_file(root, list_file=False))
    files = sorted(backend.list_dir_or_file(root, list_dir=False))
    pictures = [file for file in files if dataset.is_valid_file(file)]
    if not folders:
        if pictures:
            report.add('folder-flat', split.name, f'{root}: {len(pictures)} pictures, no folders')
        else:
            report.add('pictures-none', split.name, f'{root}: neither folders nor pictures')
        return folders, []
    for file in pictures:
        report.add('file-stray', split.name, osp.join(root, file))
    samples = []
    for label, folder in enumerate(folders):
        path = osp.join(root, folder)
        names = sorted(backend.list_dir_or_file(path, list_dir=False, recursive=True))
        names = [name for name in names if dataset.is_valid_file(name)]
        if folder.startswith('.'):
            report.add('folder-hidden', split.name, path)
        elif not names:
            report.add('folder-empty', split.name, path)
        samples += [dict(img_path=osp.join(path, name), gt_label=label) for name in names]
    valid = (*dataset.extensions, *(extension.upper() for extension in dataset.extensions))
    for file in other_pictures(root, valid):
        report.add('picture-suffix', split.name, osp.join(root, file))
    if split.classes is None:
        split.classes = folders
    else:
        check_names(split, folders, report)
    return folders, samples


def check_names(split: Split, folders: List[str], report: Report) -> None:
    """Class folders against the classes of the config."""
    root, classes = split.dataset.img_prefix, list(split.classes)
    if len(folders) != len(classes):
        place = f'{root}: {len(folders)} folders, {len(classes)} classes'
        for what, names in (
            ('without a class', sorted(set(folders) - set(classes))),
            ('without a folder', sorted(set(classes) - set(folders))),
        ):
            # The names of ImageNet's classes are not those of its folders.
            if names and set(folders) & set(classes):
                place += f'; {what}: {", ".join(names[:5])}' + ' ...' * (len(names) > 5)
        report.add('folder-count', split.name, place)
    elif set(folders) == set(classes) and folders != classes:
        i = next(i for i, name in enumerate(folders) if name != classes[i])
        place = f'{root}: folder {folders[i]!r} gets the name {classes[i]!r}'
        report.add('folder-order', split.name, place)
    elif folders != classes and classes != list(split.dataset.METAINFO.get('classes', ())):
        i = next(i for i, name in enumerate(folders) if name != classes[i])
        place = f'{root}: folder {folders[i]!r} gets the name {classes[i]!r}'
        report.add('folder-name', split.name, place)


def check_numbers(split: Split, samples: List[dict], report: Report) -> None:
    """Class numbers are those of classes, and in training every class has one."""
    numbers = set()
    for sample in samples:
        number = sample.get('gt_label')
        if number is None:
            continue
        numbers.add(int(number))
        if split.classes and not 0 <= number < len(split.classes) and 'place' in sample:
            place = f'{sample["place"]}: class {number}, {len(split.classes)} classes'
            report.add('class-number', split.name, place)
    if split.training and numbers and split.dataset.ann_file:
        for i, name in enumerate(split.classes or ()):
            if i not in numbers:
                report.add('class-unseen', split.name, f'{split.dataset.ann_file}: {name!r}')


def check_same_folders(folders: Dict[str, List[str]], report: Report) -> None:
    """Evaluation has the class folders of training."""
    if not folders:
        return
    first = next(iter(folders))
    for name, theirs in folders.items():
        extra = sorted(set(theirs) - set(folders[first]))
        missing = sorted(set(folders[first]) - set(theirs))
        if theirs and folders[first] and (extra or missing):
            parts = [
                f'{what}: {", ".join(names[:5])}' + ' ...' * (len(names) > 5)
                for what, names in ((f'only in {name}', extra), (f'only in {first}', missing))
                if names
            ]
            report.add('folders-differ', name, '; '.join(parts))

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import os.path as osp
from typing import Dict, Iterator, List, Optional, Sequence, TextIO, Tuple

from mmengine.config import Config
from mmengine.registry import init_default_scope

from . import classification, detection, segmentation
from .pictures import Opener
from .report import Report
from .splits import Split, find_splits, type_name

TASKS = dict(mmdet=detection, mmseg=segmentation, mmpretrain=classification)


def check_datasets(
    cfg: Config,
    num: Optional[int] = None,
    workers: int = 1,
    progress: Optional[TextIO] = None,
    overridden: Sequence[str] = (),
) -> Report:
    """Look for defects of the data sets of an experiment that make its training fail or mislearn.

    All annotations are checked, and that all pictures exist. Nothing is
    written or downloaded.

    Args:
        cfg: Config of a classifier, detector or segmentor.
        num: Pictures and label images to open of each data set, evenly
            spaced; None for all.
        workers: Processes that open them.
        progress: Where a progress bar goes; None for nowhere.
        overridden: Keys that the user changed in the loaded config
            (``--cfg-options``): data sets with a ``data_root`` among them need
            not agree with the config's variable of that name.
    """
    if cfg.get('default_scope'):
        init_default_scope(cfg.default_scope)
    report = Report()
    splits = find_splits(cfg, report)
    for split in splits:
        report.datasets[split.name] = dict(type=type(split.dataset).__name__)
    check_variables(cfg, splits, report, overridden)
    readable = [split for split in splits if check_metainfo(split, report)]
    opener = Opener(num, workers, progress)
    by_task: Dict[str, List[Split]] = {}
    for split in readable:
        packages = [cls.__module__.split('.')[0] for cls in type(split.dataset).__mro__]
        task = next((package for package in packages if package in TASKS), None)
        if task is None:
            report.add('dataset-unknown', split.name, type_name(split.cfg['type']))
        else:
            by_task.setdefault(task, []).append(split)
    for task, members in by_task.items():
        TASKS[task].check(cfg, members, report, opener)
        check_model(cfg, members, report)
    check_loaders(readable, report)
    return report


def check_variables(
    cfg: Config, splits: List[Split], report: Report, overridden: Sequence[str]
) -> None:
    """The config's ``data_root`` and ``classes``, if it has such variables, reach its data sets."""
    root, classes = cfg.get('data_root'), cfg.get('classes')
    roots = [split.cfg.get('data_root') for split in splits]
    changed = any(key.endswith('dataset.data_root') for key in overridden)
    if isinstance(root, str) and any(roots) and not changed:
        if osp.normpath(root) not in [osp.normpath(path) for path in roots if path]:
            report.add(
                'variable-unused', 'config', f'data_root = {root!r}, but read is {roots[0]!r}'
            )
    for split in splits:
        if classes is not None and split.classes is not None:
            if list(classes) != list(split.classes):
                place = f'classes = {short(classes)}, but {split.name} has {short(split.classes)}'
                report.add('variable-unused', 'config', place)


def check_metainfo(split: Split, report: Report) -> bool:
    """Whether the classes of a data set are such that the rest can be checked."""
    if isinstance(split.classes, str):
        report.add('classes-text', split.name, repr(split.classes))
        return False
    palette = split.dataset.metainfo.get('palette')
    if palette and split.classes and len(palette) < len(split.classes):
        place = f'{len(palette)} colours, {len(split.classes)} classes'
        report.add('palette-short', split.name, place)
    return True


def check_model(cfg: Config, splits: List[Split], report: Report) -> None:
    """Numbers of classes of heads, preprocessor and metrics, and the data sets among each other."""
    splits = [split for split in splits if split.classes]
    if not splits:
        return
    first, count = splits[0], len(splits[0].classes)
    for split in splits[1:]:
        if list(split.classes) != list(first.classes):
            place = f'{short(first.classes)} in {first.name}, {short(split.classes)} here'
            report.add('classes-differ', split.name, place)
    for path, number in class_counts(cfg):
        if number != count:
            report.add('num-classes', 'config', f'{path} = {number}, {first.name} has {count}')
    for split in splits:
        for name, evaluator in split.evaluators:
            topk = evaluator.get('topk', 1)
            if (topk if isinstance(topk, int) else max(topk)) > count:
                report.add('topk', 'config', f'{name}.topk = {topk}, {count} classes')


def class_counts(cfg: Config) -> Iterator[Tuple[str, int]]:
    """Each ``num_classes`` of the model and the data preprocessor, with its place."""
    stack = [('model', cfg.model), ('data_preprocessor', cfg.get('data_preprocessor') or {})]
    while stack:
        path, node = stack.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            if key == 'num_classes' and isinstance(value, int):
                yield f'{path}.{key}', value
            elif isinstance(value, (dict, list, tuple)) and key not in ('backbone', 'rpn_head'):
                stack.append((f'{path}.{key}', value))


def check_loaders(splits: List[Split], report: Report) -> None:
    """Each loader yields batches, and training and evaluation do not read the same files."""
    for split in splits:
        if split.num_samples is None:
            continue
        infinite = type_name(split.loader.get('sampler', {}).get('type', '')).startswith('Infinite')
        batch_size = split.loader.get('batch_size', 1)
        if split.num_samples == 0:
            report.add('no-samples', split.name, f'{split.cfg.get("data_root")}: 0 samples')
        elif (
            split.loader.get('drop_last', False)
            and split.num_samples < batch_size
            and not infinite
            and split.loader['dataset'] == split.cfg
        ):
            place = f'{split.num_samples} samples, batch_size {batch_size}, drop_last True'
            report.add('no-samples', split.name, place)
    train = [split for split in splits if split.training]
    for split in splits:
        if not split.training and any(_source(split) == _source(other) for other in train):
            report.add('same-data', split.name, str(split.cfg.get('data_root')))


def _source(split: Split) -> tuple:
    dataset = split.dataset
    return (dataset.ann_file, dict(dataset.data_prefix), split.cfg.get('split'))


def short(classes: Sequence[str], limit: int = 5) -> str:
    more = len(classes) - limit
    names = ', '.join(repr(name) for name in list(classes)[:limit])
    return f'({names}{f", and {more} more" if more > 0 else ""})'

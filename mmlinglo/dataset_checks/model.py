# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Compare the config with its data sets: variables, classes of the model, data loaders."""

import os.path as osp
import re
from typing import Iterator, List, Optional, Sequence, Tuple

import numpy as np
from mmengine.config import Config
from mmengine.fileio import load

from .report import Report
from .splits import Split, first_line, type_name

STRIDE = 32  # of LinGlo's last stage, in pixels


def check_variables(
    cfg: Config, splits: List[Split], report: Report, overridden: Sequence[str]
) -> None:
    """Check that the variables ``data_root`` and ``classes``, if the config has them, reach its data sets."""
    root, classes = cfg.get('data_root'), cfg.get('classes')
    roots = [osp.normpath(path) for path in (s.cfg.get('data_root') for s in splits) if path]
    if isinstance(root, str) and roots and is_unused(cfg, 'data_root', overridden):
        if osp.normpath(root) not in roots:
            place = f'data_root = {root!r}, but the data sets read {roots[0]!r}'
            report.add('variable-unused', 'config', place)
    if isinstance(classes, (list, tuple)) and is_unused(cfg, 'classes', overridden):
        for split in splits:
            if split.classes is not None and list(classes) != list(split.classes):
                place = f'classes = {short(classes)}, but {split.name} has {short(split.classes)}'
                report.add('variable-unused', 'config', place)


def is_unused(cfg: Config, name: str, overridden: Sequence[str]) -> bool:
    """Whether no setting with this key follows the last assignment of the variable.

    A correct config may set ``dataset.data_root`` and not change the variable of its base.
    ``cfg.text`` holds all files, base configs first.
    """
    text = re.sub(r'#.*', '', cfg.text or '')
    *_, rest = re.split(rf'^{name}\s*=(?!=)', text, flags=re.M)
    used = re.search(rf'(?<![\w.]){name}\s*=(?!=)|[\'"]{name}[\'"]\s*:', rest)
    return name in overridden or (rest != text and used is None)


def check_metainfo(split: Split) -> bool:
    """Check the classes of a data set. Return whether the other checks can use them."""
    if isinstance(split.classes, str):
        split.add('classes-text', repr(split.classes))
        return False
    palette = split.dataset.metainfo.get('palette')
    if palette and split.classes and len(palette) < len(split.classes):
        split.add('palette-short', f'{len(palette)} colours, {len(split.classes)} classes')
    return True


def check_model(cfg: Config, splits: List[Split], report: Report) -> None:
    """Compare the numbers of classes of heads, losses, preprocessor and metrics with the data sets."""
    known = [(split, split.classes) for split in splits if split.classes]
    if not known:
        return
    first, classes = known[0]
    count = len(classes)
    for split, theirs in known[1:]:
        if list(theirs) != list(classes):
            there, here = short(classes), short(theirs)
            split.add('classes-differ', f'{there} in {first.name}, {here} here')
    for path, node in model_nodes(cfg):
        for key, number in class_counts(node):
            if number != count:
                place = f'{path}.{key} = {number}, {first.name} has {count}'
                report.add('num-classes', 'config', place)
        for check, problem in loss_problems(cfg, node, count):
            report.add(check, 'config', f'{path}: {problem}')
    for split, _ in known:
        for name, evaluator in split.evaluators:
            topk = evaluator.get('topk', 1)
            if (topk if isinstance(topk, int) else max(topk)) > count:
                report.add('topk', 'config', f'{name}.topk = {topk}, {count} classes')


def model_nodes(cfg: Config) -> Iterator[Tuple[str, dict]]:
    """Find all dicts of the model and the data preprocessor that may depend on classes."""
    stack = [('model', cfg.model), ('data_preprocessor', cfg.get('data_preprocessor') or {})]
    while stack:
        path, node = stack.pop()
        if isinstance(node, dict):
            yield path, node
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(value, (dict, list, tuple)) and key not in ('backbone', 'rpn_head'):
                stack.append((f'{path}.{key}', value))


def class_counts(node: dict) -> Iterator[Tuple[str, int]]:
    """Find the numbers of classes of a part of the model, with the keys that state them."""
    things, stuff = node.get('num_things_classes'), node.get('num_stuff_classes', 0)
    if isinstance(node.get('num_classes'), int):
        yield 'num_classes', node['num_classes']
    elif isinstance(things, int):
        yield f'num_things_classes + num_stuff_classes = {things} + {stuff}', things + stuff


def loss_problems(cfg: Config, node: dict, count: int) -> Iterator[Tuple[str, str]]:
    """Find class weights and outputs of a decode head that do not fit the classes."""
    weights, file = node.get('class_weight'), ''
    if isinstance(weights, str) and not weights.endswith(('.pickle', '.pkl')):  # these can run code
        file = f' of {weights!r}'
        try:  # as mmseg reads it
            weights = np.load(weights).tolist() if weights.endswith('.npy') else load(weights)
        except Exception as error:  # a damaged file can raise anything
            yield 'class-weight', f'class_weight{file} cannot be read: {first_line(error)}'
    if isinstance(weights, (list, tuple)) and not node.get('use_mask'):
        scope, _, kind = str(node.get('type', '')).rpartition('.')
        softmax = kind == 'CrossEntropyLoss' and not node.get('use_sigmoid')
        background = softmax and (scope or cfg.get('default_scope')) == 'mmdet'
        if len(weights) != count + background:
            place = f'class_weight{file} has {len(weights)} values, {count + background} are needed'
            yield 'class-weight', place + ' (with one for the background)' * background
    channels, classes = node.get('out_channels'), node.get('num_classes')
    if isinstance(channels, int) and isinstance(classes, int) and channels != classes:
        losses = node.get('loss_decode', dict(type='CrossEntropyLoss'))
        softmax = any(
            type_name(loss['type']) == 'CrossEntropyLoss' and not loss.get('use_sigmoid')
            for loss in ([losses] if isinstance(losses, dict) else losses)
        )
        if softmax or (channels, classes) != (1, 2):
            loss = ', and a softmax loss (use_sigmoid=False)' * softmax
            yield 'out-channels', f'out_channels = {channels}, num_classes = {classes}{loss}'


def check_loaders(cfg: Config, splits: List[Split]) -> None:
    """Check that each loader yields batches, and that training and evaluation read different files."""
    for split in splits:
        count, batch_size = split.num_samples, split.loader.get('batch_size', 1)
        times = repetitions(split.loader['dataset'], split.cfg)
        count = count and count * (times or 1)
        place = f'{count} samples, batch_size {batch_size}'
        sampler = type_name(split.loader.get('sampler', {}).get('type', ''))
        # Not endless, and not joined with others.
        plain = not sampler.startswith('Infinite') and times is not None
        drop_last = split.loader.get('drop_last', False)
        if count == 0:
            split.add('no-samples', f'{split.cfg.get("data_root")}: 0 samples')
        elif count is not None and plain and drop_last and count < batch_size:
            split.add('no-samples', f'{place}, drop_last True')
        elif split.training and split.input_size and max(split.input_size) <= STRIDE:
            last = (count or 0) % batch_size if plain and not drop_last else 0
            backbone = type_name((cfg.model.get('backbone') or {}).get('type', ''))
            if 1 in (batch_size, last) and backbone == 'LinGlo':
                height, width = split.input_size
                split.add('last-batch', f'{place}, input {width} x {height}')
    train = [_source(split) for split in splits if split.training]
    for split in splits:
        if not split.training and _source(split) in train:
            split.add('same-data', str(split.cfg.get('data_root')))


def repetitions(cfg: dict, leaf: dict) -> Optional[int]:
    """How often a loader's data set yields each sample of one of its data sets; None if it chooses or joins."""
    times = 1
    while cfg != leaf and type_name(cfg.get('type', '')) == 'RepeatDataset':
        times, cfg = times * cfg['times'], cfg['dataset']
    return times if cfg == leaf else None


def _source(split: Split) -> tuple:
    dataset = split.dataset
    return (dataset.ann_file, dict(dataset.data_prefix), split.cfg.get('split'))


def short(classes: Sequence[str], limit: int = 5) -> str:
    """Show the first names of a long list."""
    names = ', '.join(repr(name) for name in list(classes)[:limit])
    return f'({names}{f", and {len(classes) - limit} more" * (len(classes) > limit)})'

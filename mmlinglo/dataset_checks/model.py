# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The config against its data sets: variables, classes of the model, data loaders."""

import os.path as osp
import re
from typing import Iterator, List, Sequence, Tuple

from mmengine.config import Config

from .report import Report
from .splits import Split, type_name

STRIDE = 32  # of LinGlo's last stage, in pixels


def check_variables(
    cfg: Config, splits: List[Split], report: Report, overridden: Sequence[str]
) -> None:
    """The config's ``data_root`` and ``classes``, if it has such variables, reach its data sets."""
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
    """Whether nothing is set to a value for this key after the variable was set last.

    A right config may set ``dataset.data_root`` and leave the variable of its base as it is.
    ``cfg.text`` holds all files, base configs first.
    """
    text = re.sub(r'#.*', '', cfg.text or '')
    *_, rest = re.split(rf'^{name}\s*=(?!=)', text, flags=re.M)
    used = re.search(rf'(?<![\w.]){name}\s*=(?!=)|[\'"]{name}[\'"]\s*:', rest)
    return name in overridden or (rest != text and used is None)


def check_metainfo(split: Split) -> bool:
    """Whether the classes of a data set are such that the rest can be checked."""
    if isinstance(split.classes, str):
        split.add('classes-text', repr(split.classes))
        return False
    palette = split.dataset.metainfo.get('palette')
    if palette and split.classes and len(palette) < len(split.classes):
        split.add('palette-short', f'{len(palette)} colours, {len(split.classes)} classes')
    return True


def check_model(cfg: Config, splits: List[Split], report: Report) -> None:
    """Numbers of classes of heads, losses, preprocessor and metrics, and of the data sets."""
    if not splits:
        return
    first, count = splits[0], len(splits[0].classes)
    for split in splits[1:]:
        if list(split.classes) != list(first.classes):
            there, here = short(first.classes), short(split.classes)
            split.add('classes-differ', f'{there} in {first.name}, {here} here')
    for path, node in model_nodes(cfg):
        for key, number in class_counts(node):
            if number != count:
                place = f'{path}.{key} = {number}, {first.name} has {count}'
                report.add('num-classes', 'config', place)
        for check, problem in loss_problems(cfg, node, count):
            report.add(check, 'config', f'{path}: {problem}')
    for split in splits:
        for name, evaluator in split.evaluators:
            topk = evaluator.get('topk', 1)
            if (topk if isinstance(topk, int) else max(topk)) > count:
                report.add('topk', 'config', f'{name}.topk = {topk}, {count} classes')


def model_nodes(cfg: Config) -> Iterator[Tuple[str, dict]]:
    """Each dict of the model and the data preprocessor that may have to do with classes."""
    stack = [('model', cfg.model), ('data_preprocessor', cfg.get('data_preprocessor') or {})]
    while stack:
        path, node = stack.pop()
        if isinstance(node, dict):
            yield path, node
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(value, (dict, list, tuple)) and key not in ('backbone', 'rpn_head'):
                stack.append((f'{path}.{key}', value))


def class_counts(node: dict) -> Iterator[Tuple[str, int]]:
    """Numbers of classes of a part of the model, with what states them."""
    things, stuff = node.get('num_things_classes'), node.get('num_stuff_classes', 0)
    if isinstance(node.get('num_classes'), int):
        yield 'num_classes', node['num_classes']
    elif isinstance(things, int):
        yield f'num_things_classes + num_stuff_classes = {things} + {stuff}', things + stuff


def loss_problems(cfg: Config, node: dict, count: int) -> Iterator[Tuple[str, str]]:
    """Weights of classes, and outputs of a decode head, that do not fit the classes."""
    weights = node.get('class_weight')
    if isinstance(weights, (list, tuple)) and not node.get('use_mask'):
        scope, _, kind = str(node.get('type', '')).rpartition('.')
        softmax = kind == 'CrossEntropyLoss' and not node.get('use_sigmoid')
        background = softmax and (scope or cfg.get('default_scope')) == 'mmdet'
        if len(weights) != count + background:
            place = f'class_weight has {len(weights)} values, {count + background} are needed'
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
    """Each loader yields batches, and training and evaluation do not read the same files."""
    for split in splits:
        count, batch_size = split.num_samples, split.loader.get('batch_size', 1)
        place = f'{count} samples, batch_size {batch_size}'
        sampler = type_name(split.loader.get('sampler', {}).get('type', ''))
        # Neither endless nor repeated or joined with others.
        plain = not sampler.startswith('Infinite') and split.loader['dataset'] == split.cfg
        drop_last = split.loader.get('drop_last', False)
        if count == 0:
            split.add('no-samples', f'{split.cfg.get("data_root")}: 0 samples')
        elif count is not None and plain and drop_last and count < batch_size:
            split.add('no-samples', f'{place}, drop_last True')
        elif split.training and split.input_size and max(split.input_size) <= STRIDE:
            last = (count or 0) % batch_size if plain and not drop_last else 0
            if 1 in (batch_size, last) and type_name(cfg.model.backbone.type) == 'LinGlo':
                height, width = split.input_size
                split.add('last-batch', f'{place}, input {width} x {height}')
    train = [_source(split) for split in splits if split.training]
    for split in splits:
        if not split.training and _source(split) in train:
            split.add('same-data', str(split.cfg.get('data_root')))


def _source(split: Split) -> tuple:
    dataset = split.dataset
    return (dataset.ann_file, dict(dataset.data_prefix), split.cfg.get('split'))


def short(classes: Sequence[str], limit: int = 5) -> str:
    """The first names of many."""
    names = ', '.join(repr(name) for name in list(classes)[:limit])
    return f'({names}{f", and {len(classes) - limit} more" * (len(classes) > limit)})'

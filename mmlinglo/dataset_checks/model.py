# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Compare the config with its data sets: variables, classes of the model, data loaders."""

import os.path as osp
import re
import reprlib
from contextlib import suppress
from typing import Iterator, List, Optional, Sequence, Tuple

import numpy as np
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.registry import MODELS

from mmlinglo.utils.cli import type_name

from .checks import Report
from .splits import Split, as_list, first_line, size


def check_variables(
    cfg: Config, splits: List[Split], report: Report, overridden: Sequence[str]
) -> None:
    """Check that the variables ``data_root`` and ``classes``, if the config has them, reach its data sets."""
    roots = [osp.normpath(s.cfg['data_root']) for s in splits if s.cfg.get('data_root')]
    classes = [list(split.classes) for split in splits if split.classes]
    root, names = (
        cfg.get(name) if is_unused(cfg, name, overridden) else None
        for name in ('data_root', 'classes')
    )
    if isinstance(root, str) and roots and osp.normpath(root) not in roots:
        place = f'data_root = {root!r}, but the data sets read {roots[0]!r}'
        report.add('variable-unused', 'config', place)
    if isinstance(names, (list, tuple)) and classes and list(names) not in classes:
        place = f'classes = {short(names)}, but the data sets have {short(classes[0])}'
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


def check_model(cfg: Config, splits: List[Split], report: Report) -> None:
    """Compare the numbers of classes of heads, losses, preprocessor and metrics with the data sets."""
    known = [split for split in splits if split.classes]
    if not known:
        return
    first, classes = known[0], list(known[0].classes)
    for split in known:
        if list(split.classes) != classes:
            place = f'{short(classes)} in {first.name}, {short(split.classes)} here'
            split.add('classes-differ', place)
        for name, metric in split.evaluators:
            if np.max(metric.get('topk', 1)) > len(classes):
                place = f'{name}.topk = {metric["topk"]}, {len(classes)} classes'
                report.add('topk', 'config', place)
    for path, node in model_nodes(cfg):
        for check, problem in node_problems(cfg, node, len(classes), first.name):
            report.add(check, 'config', f'{path}{problem}')


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


def node_problems(cfg: Config, node: dict, count: int, where: str) -> Iterator[Tuple[str, str]]:
    """Find numbers of classes, class weights and outputs of a decode head that do not fit the classes."""
    classes, channels = node.get('num_classes'), node.get('out_channels')
    things, stuff = node.get('num_things_classes'), node.get('num_stuff_classes', 0)
    if isinstance(classes, int) and classes != count:
        yield 'num-classes', f'.num_classes = {classes}, {where} has {count}'
    elif classes is None and isinstance(things, int) and things + stuff != count:
        total = f'num_stuff_classes = {things} + {stuff} = {things + stuff}'
        yield 'num-classes', f'.num_things_classes + {total}, {where} has {count}'
    weights, file = node.get('class_weight'), ''
    if isinstance(weights, str) and not weights.endswith(('.pickle', '.pkl')):  # these can run code
        file = f' of {weights!r}'
        try:  # as mmseg reads it
            weights = np.load(weights).tolist() if weights.endswith('.npy') else load(weights)
        except Exception as error:  # a damaged file can raise anything
            yield 'class-weight', f': class_weight{file} cannot be read: {first_line(error)}'
    if isinstance(weights, (list, tuple)) and not node.get('use_mask'):
        scope = str(node.get('type', '')).rpartition('.')[0] or cfg.get('default_scope')
        background = scope == 'mmdet' and is_softmax(node)
        needed = f'{count + background} are needed'
        needed += ' (with one for the background)' * background
        if len(weights) != count + background:
            yield 'class-weight', f': class_weight{file} has {len(weights)} values, {needed}'
    if isinstance(channels, int) and isinstance(classes, int) and channels != classes:
        losses = as_list(node.get('loss_decode', dict(type='CrossEntropyLoss')))
        softmax = any(map(is_softmax, losses))
        if softmax or (channels, classes) != (1, 2):
            loss = ', and a softmax loss (use_sigmoid=False)' * softmax
            yield 'out-channels', f': out_channels = {channels}, num_classes = {classes}{loss}'


def is_softmax(loss: dict) -> bool:
    return type_name(loss.get('type', '')) == 'CrossEntropyLoss' and not loss.get('use_sigmoid')


def check_loaders(cfg: Config, splits: List[Split]) -> None:
    """Check that each loader yields batches, and that training and evaluation read different files."""
    min_size = smallest_input(cfg)
    for split in splits:
        split.used = select(split)
    train = [split for split in splits if split.training]
    for split in splits:
        same = [each.used or () for each in train if _source(each) == _source(split)]
        if not split.training and set(split.used or ()) & set().union(*same):
            split.add('same-data', str(split.cfg.get('data_root')))
        if split.used is None:
            continue
        times, batch_size = repetitions(split), split.loader.get('batch_size', 1)
        count, drop_last = len(split.used) * (times or 1), split.loader.get('drop_last', False)
        place = f'{count} samples, batch_size {batch_size}'
        sampler = type_name(split.loader.get('sampler', {}).get('type', ''))
        # Not endless, and not joined with others.
        plain = not sampler.startswith('Infinite') and times is not None
        last = count % batch_size if plain and not drop_last else 0
        if count == 0:
            split.add('no-samples', f'{split.cfg.get("data_root")}: 0 samples')
        elif plain and drop_last and count < batch_size:
            split.add('no-samples', f'{place}, drop_last True')
        elif split.training and min_size:
            shape = input_size(cfg, split)
            if shape is not None and min(shape) < min_size:
                split.add('input-small', f'input {size(shape)}, smallest {min_size} x {min_size}')
            elif shape is not None and max(shape) <= min_size and 1 in (batch_size, last):
                split.add('last-batch', f'{place}, input {size(shape)}')


def select(split: Split) -> Optional[Sequence]:
    """Apply the setting ``indices`` of a data set to the samples it uses, as mmengine does."""
    used, indices = split.used, split.cfg.get('indices')
    if used is None or indices is None:
        return used
    try:
        if isinstance(indices, int):
            return used[:indices] if indices >= 0 else used[indices:]
        return [used[i] for i in indices]
    except (IndexError, TypeError) as error:
        place = f'indices = {reprlib.repr(indices)} of {len(used)} samples: {error}'
        split.add('dataset-unbuildable', place)
        return None


def smallest_input(cfg: Config) -> int:
    """Smallest height and width in pixels that a LinGlo backbone takes; 0 for another backbone."""
    backbone = cfg.model.get('backbone') or {}
    if type_name(backbone.get('type', '')) == 'LinGlo':
        with suppress(Exception):  # wrong arguments, which the training names
            return MODELS.build(backbone).min_size
    return 0


def input_size(cfg: Config, split: Split) -> Optional[Tuple[int, ...]]:
    """Height and width of the network's inputs in pixels; None if the first samples give none."""
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    shape = next(filter(None, map(split.transformed_size, (split.samples or [])[:3])), None)
    divisor = preprocessor.get('pad_size_divisor') or preprocessor.get('size_divisor') or 1
    sizes = zip(shape or (), preprocessor.get('size') or (0, 0))
    return tuple(-(-max(pair) // divisor) * divisor for pair in sizes) or None


def repetitions(split: Split) -> Optional[int]:
    """How often the data loader yields each sample; None if its data set chooses or joins samples."""
    times, cfg = 1, split.loader['dataset']
    while cfg != split.cfg and type_name(cfg.get('type', '')) == 'RepeatDataset':
        times, cfg = times * cfg['times'], cfg['dataset']
    return times if cfg == split.cfg else None


def _source(split: Split) -> tuple:
    dataset = split.dataset
    return (dataset.ann_file, dict(dataset.data_prefix), split.cfg.get('split'))


def short(classes: Sequence[str], limit: int = 5) -> str:
    """Show the first names of a long list."""
    names = ', '.join(repr(name) for name in list(classes)[:limit])
    return f'({names}{f", and {len(classes) - limit} more" * (len(classes) > limit)})'

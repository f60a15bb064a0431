# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The data sets of a config, opened but not loaded."""

from dataclasses import dataclass
from typing import Any, Iterator, List, Optional, Sequence, Tuple

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS

from .report import Report


@dataclass
class Split:
    """One data set of a config.

    Attributes:
        name: ``train``, ``val``, ``test``, or ``val, test`` if both are the same.
        loader: Settings of its data loader.
        cfg: Settings of the data set, without wrappers such as RepeatDataset.
        evaluators: Settings of the metrics that use it, with their names in
            the config.
        dataset: The data set: its paths are joined, no annotations are loaded.
        classes: Names of its classes; None as long as they are unknown.
        num_samples: How many samples training or evaluation gets out of it;
            None as long as that is unknown.
    """

    name: str
    loader: dict
    cfg: dict
    evaluators: List[Tuple[str, dict]]
    dataset: BaseDataset
    classes: Optional[Sequence[str]]
    num_samples: Optional[int] = None

    @property
    def training(self) -> bool:
        return self.name.startswith('train')

    def step(self, name: str) -> dict:
        """Settings of the first step of the pipeline of this type; {} without one."""
        steps = [step for step in self.cfg.get('pipeline', []) if isinstance(step, dict)]
        return next((step for step in steps if type_name(step['type']) == name), {})


def type_name(value: Any) -> str:
    """Name of a ``type`` in a config, which is a class or a text with or without a scope."""
    return value.split('.')[-1] if isinstance(value, str) else value.__name__


def find_splits(cfg: Config, report: Report) -> List[Split]:
    """Open the data sets of an experiment; those that cannot be opened are reported."""
    groups = [[name] for name in ('train', 'val', 'test') if cfg.get(f'{name}_dataloader')]
    if groups[-2:] == [['val'], ['test']]:
        if cfg.val_dataloader.dataset == cfg.test_dataloader.dataset:
            groups[-2:] = [['val', 'test']]
    splits = []
    for group in groups:
        loader = cfg[f'{group[0]}_dataloader']
        leaves = list(_leaves(loader.dataset))
        for i, leaf in enumerate(leaves):
            name = ', '.join(group) + (f' {i}' if len(leaves) > 1 else '')
            try:
                dataset = _open(leaf)
            except Exception as error:  # whatever the data set's constructor raises
                report.add('dataset-unbuildable', name, f'{leaf.get("type")}: {first_line(error)}')
                continue
            evaluators = [item for key in group for item in _evaluators(cfg, key)]
            classes = dataset.metainfo.get('classes')
            splits.append(Split(name, loader, leaf, evaluators, dataset, classes))
    return splits


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _leaves(cfg: dict) -> Iterator[dict]:
    if 'datasets' in cfg:  # ConcatDataset
        for inner in cfg['datasets']:
            yield from _leaves(inner)
    elif isinstance(cfg.get('dataset'), dict):  # RepeatDataset, ClassBalancedDataset, ...
        yield from _leaves(cfg['dataset'])
    else:
        yield cfg


def _open(cfg: dict) -> BaseDataset:
    dataset = DATASETS.build(dict(cfg, pipeline=[], lazy_init=True))
    if hasattr(dataset, 'download'):  # CIFAR10 and others fetch themselves when they are loaded
        dataset.download = False
    return dataset


def _evaluators(cfg: Config, name: str) -> List[Tuple[str, dict]]:
    evaluator = cfg.get(f'{name}_evaluator') or []
    evaluators = [evaluator] if isinstance(evaluator, dict) else evaluator
    return [(f'{name}_evaluator', item) for item in evaluators]

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The data sets of a config, opened but not loaded."""

import copy
from dataclasses import dataclass
from typing import Any, Iterator, List, Optional, Sequence, Tuple

from mmengine.config import Config
from mmengine.dataset import BaseDataset, Compose
from mmengine.registry import DATASETS

from .report import Report


@dataclass
class Split:
    """One data set of a config.

    Attributes:
        name: ``train``, ``val``, ``test``, or ``val, test`` if both are the same.
        loader: Settings of its data loader.
        cfg: Settings of the data set, without wrappers such as RepeatDataset.
        evaluators: Settings of the metrics that use it, with their names in the config.
        dataset: The data set. Its paths are complete, but it has loaded no annotations.
        classes: Names of its classes; None while they are unknown.
        report: Report that gets the findings.
        num_samples: Number of samples that training or evaluation gets; None if unknown.
        input_size: Height and width in pixels of the network's inputs; None if unknown.
    """

    name: str
    loader: dict
    cfg: dict
    evaluators: List[Tuple[str, dict]]
    dataset: BaseDataset
    classes: Optional[Sequence[str]]
    report: Report
    num_samples: Optional[int] = None
    input_size: Optional[Tuple[int, int]] = None

    @property
    def training(self) -> bool:
        return self.name.startswith('train')

    def add(self, check: str, place: str) -> None:
        """Report a defect of this data set."""
        self.report.add(check, self.name, place)

    def count(self, **numbers: int) -> None:
        """Note numbers, such as those of images and boxes, for the head of the report."""
        self.report.datasets[self.name].update(numbers, classes=len(self.classes or ()))

    def step(self, name: str) -> dict:
        """Settings of the first pipeline step of this type; {} if there is none."""
        steps = [step for step in self.cfg.get('pipeline') or [] if isinstance(step, dict)]
        return next((step for step in steps if type_name(step['type']) == name), {})

    def prefix(self, key: str) -> Optional[str]:
        """The folder of the images. If ``data_prefix`` does not name it, report this and return None."""
        folder = self.dataset.data_prefix.get(key)
        if folder is None:
            self.add('data-prefix', f'data_prefix = {self.cfg.get("data_prefix")} has no {key!r}')
        return folder

    def can_read(self, path: str) -> bool:
        """Whether a list is in UTF-8, as the training reads it. If not, report this."""
        problem = encoding_problem(path)
        if problem is not None:
            self.add('annotations-unreadable', f'{path}: {problem}')
        return problem is None

    def load(self, check: str) -> Optional[List[dict]]:
        """Load the samples of the data set. If this fails, report it and return None."""
        try:
            samples = self.dataset.load_data_list()
        except Exception as error:  # missing or broken files can raise anything
            self.add(check, first_line(error))
            return None
        self.num_samples = len(samples)
        return samples

    def transformed_size(self, sample: dict) -> Optional[Tuple[int, int]]:
        """Height and width of a sample after the pipeline; None if the pipeline fails."""
        try:
            return tuple(Compose(self.cfg['pipeline'])(copy.deepcopy(sample))['inputs'].shape[-2:])
        except Exception:  # a damaged file can raise anything; another check reports it
            return None


def type_name(value: Any) -> str:
    """Name of a ``type`` in a config: a class, or a text with or without a scope."""
    return value.split('.')[-1] if isinstance(value, str) else value.__name__


def find_splits(cfg: Config, report: Report) -> List[Split]:
    """Open the data sets of an experiment, and report those that cannot be opened."""
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
                dataset = DATASETS.build(dict(leaf, pipeline=[], lazy_init=True))
            except Exception as error:  # the data set's constructor can raise anything
                report.add('dataset-unbuildable', name, f'{leaf.get("type")}: {first_line(error)}')
                continue
            if hasattr(
                dataset, 'download'
            ):  # CIFAR10 and others download themselves when they load
                dataset.download = False
            report.datasets[name] = dict(type=type(dataset).__name__)
            evaluators = [item for key in group for item in _evaluators(cfg, f'{key}_evaluator')]
            classes = dataset.metainfo.get('classes')
            splits.append(Split(name, loader, leaf, evaluators, dataset, classes, report))
    return splits


def encoding_problem(path: str) -> Optional[str]:
    """Explain why a text cannot be read although an editor shows it."""
    try:
        with open(path, 'rb') as file:
            start = file.read(4)
    except OSError:
        return None
    if start[:2] in (b'\xff\xfe', b'\xfe\xff') or b'\0' in start:
        return 'the text is UTF-16 or UTF-32: save it as UTF-8'
    if start[:3] == b'\xef\xbb\xbf':
        return 'the text starts with a byte-order mark: save it as UTF-8 without one'
    return None


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


def _evaluators(cfg: Config, name: str) -> List[Tuple[str, dict]]:
    evaluator = cfg.get(name) or []
    return [(name, item) for item in ([evaluator] if isinstance(evaluator, dict) else evaluator)]

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Find what is wrong with the data of an experiment before you train on it."""

from functools import partial
from typing import Dict, List, Optional, Sequence, TextIO

from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmlinglo.utils.cli import type_name

from . import classification, detection, segmentation
from .checks import CHECKS, Finding, Report
from .model import check_loaders, check_model, check_variables
from .splits import Split, find_splits, open_samples

__all__ = ['CHECKS', 'Finding', 'Report', 'check_datasets']
TASKS = dict(mmdet=detection, mmseg=segmentation, mmpretrain=classification)


def check_datasets(
    cfg: Config,
    num: Optional[int] = None,
    workers: int = 1,
    progress: Optional[TextIO] = None,
    overridden: Sequence[str] = (),
) -> Report:
    """Find defects in the data sets of an experiment that make its training fail or learn something wrong.

    The function checks all annotations, and that all images exist. It writes and downloads nothing.

    Args:
        cfg: Config of a classifier, detector or segmentor.
        num: Number of images and label images to open of each data set, evenly spaced; None for all.
        workers: Processes that open them.
        progress: Stream for a progress bar; None for no bar.
        overridden: Keys that the user changed in the loaded config (``--cfg-options``).
    """
    if cfg.get('default_scope'):
        init_default_scope(cfg.default_scope)
    report = Report()
    splits = find_splits(cfg, report)
    check_variables(cfg, splits, report, overridden)
    by_task: Dict[str, List[Split]] = {}
    for split in splits:
        packages = [cls.__module__.split('.')[0] for cls in type(split.dataset).__mro__]
        task = next((package for package in packages if package in TASKS), None)
        if task is None:
            split.add('dataset-unknown', type_name(split.cfg['type']))
        else:
            by_task.setdefault(task, []).append(split)
    opener = partial(open_samples, num=num, workers=workers, progress=progress)
    for task, members in by_task.items():
        TASKS[task].check(cfg, members, opener)
        check_model(cfg, members, report)
    check_loaders(cfg, splits)
    return report

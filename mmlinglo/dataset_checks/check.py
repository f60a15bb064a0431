# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from typing import Dict, List, Optional, Sequence, TextIO

from mmengine.config import Config
from mmengine.registry import init_default_scope

from . import classification, detection, segmentation
from .model import check_loaders, check_metainfo, check_model, check_variables
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
    readable = [split for split in splits if check_metainfo(split)]
    by_task: Dict[str, List[Split]] = {}
    for split in readable:
        packages = [cls.__module__.split('.')[0] for cls in type(split.dataset).__mro__]
        task = next((package for package in packages if package in TASKS), None)
        if task is None:
            split.add('dataset-unknown', type_name(split.cfg['type']))
        else:
            by_task.setdefault(task, []).append(split)
    for task, members in by_task.items():
        TASKS[task].check(cfg, members, Opener(num, workers, progress))
        check_model(cfg, members, report)
    check_loaders(cfg, readable)
    return report

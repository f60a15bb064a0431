# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Trainings of seconds on a very small synthetic data set, through the command lines."""

import json
import os
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, List

from conftest import ROOT
from preloaded_python import preloaded_python

QUICKSTART = ROOT / 'configs/quickstart'
TASKS = dict(
    detection='retinanet_linglo-b0_fpn_2xb4-3e_shapes.py',
    segmentation='fpn_linglo-b0_2xb4-360_shapes-160x160.py',
    classification='linglo-b0_2xb16-8e_shapes.py',
)
SUB_FOLDERS = dict(detection='coco/', segmentation='ade/', classification='imagenet')
LAST = dict(detection='epoch_2', segmentation='iter_4', classification='epoch_2')
TINY = """
arch = dict(
    _delete_=True, embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1),
    mlp_ratio=(2, 2, 2, 2),
)
"""
TINY_MODELS = dict(
    detection=TINY + 'model = dict(backbone=dict(arch=arch), neck=dict(in_channels=[16, 24, 32]))',
    segmentation=TINY
    + 'model = dict(backbone=dict(arch=arch), neck=dict(in_channels=[8, 16, 24, 32]))',
    classification=TINY + 'model = dict(backbone=dict(arch=arch), head=dict(in_channels=32))',
)


def write_config(path: Path, shapes: Path, task: str, extra: str = '', base: str = '') -> Path:
    """The quickstart's config on the very small data set: 2 epochs, batches of 4."""
    root = f'{shapes}/{SUB_FOLDERS[task]}'
    lines = [
        f"_base_ = '{base or QUICKSTART / TASKS[task]}'",
        'train_cfg = dict(max_iters=4, val_interval=4)'
        if task == 'segmentation'
        else 'train_cfg = dict(max_epochs=2, val_interval=2)',
        f"train_dataloader = dict(batch_size=4, dataset=dict(data_root='{root}'))",
        f"val_dataloader = dict(dataset=dict(data_root='{root}'))",
        'test_dataloader = val_dataloader',
    ]
    if task == 'detection':
        lines += [
            f"val_evaluator = dict(ann_file='{root}annotations/val.json')",
            'test_evaluator = val_evaluator',
            # a few steps give no box a score above the usual threshold
            'model = dict(test_cfg=dict(score_thr=0.0))',
        ]
    if task == 'segmentation':
        lines += ['default_hooks = dict(checkpoint=dict(interval=2))']
    path.write_text('\n'.join([*lines, extra]))
    return path


def write_tiny_config(folder: Path, shapes: Path, task: str, extra: str = '') -> Path:
    """The same with a tiny model, without data workers; ``extra`` may change all of it."""
    write_config(folder / 'base.py', shapes, task)
    lines = ["_base_ = './base.py'", TINY_MODELS[task]]
    lines += [f'{split}_dataloader = dict(num_workers=0)' for split in ('train', 'val', 'test')]
    (folder / 'tiny.py').write_text('\n'.join(lines))
    config = folder / 'config.py'
    config.write_text(f"_base_ = './tiny.py'\n{extra}\n")
    return config


@contextmanager
def fast_tools() -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    """Give a function that runs a tool as a user would, without the time of the imports."""
    environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': ''}
    environment['PYTHONPATH'] = f'{ROOT}{os.pathsep}{environment.get("PYTHONPATH", "")}'
    with (
        tempfile.TemporaryDirectory() as folder,  # a socket's path must be short
        preloaded_python(Path(folder) / 'bin', environment) as python,
    ):

        def run(tool, *args, check=True, **env) -> subprocess.CompletedProcess:
            result = subprocess.run(
                [python, ROOT / tool, *map(str, args)],
                cwd=ROOT,
                env={**environment, **env},
                capture_output=True,
                text=True,
                timeout=600,
            )
            if check and result.returncode:
                raise AssertionError(
                    f'{tool} ended with {result.returncode}: {result.stderr[-4000:]}'
                )
            return result

        yield run


def logged(work_dir: Path) -> List[dict]:
    """Lines of the newest log of a training."""
    path = max(work_dir.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for line in path.read_text().splitlines()]

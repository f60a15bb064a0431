# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Campaigns of short trainings on CIFAR-10, which go on where they were interrupted.

A campaign's folder holds, for each training, its settings ``<row>/seed<k>.py`` beside its work dir
``<row>/seed<k>/``.
"""

import argparse
import fcntl
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import pandas as pd
from mmengine.config import Config, DictAction
from mmengine.registry import DATASETS, init_default_scope

from mmlinglo.analysis.curves import read_scalars
from mmlinglo.utils.cli import UsageError, key_value, load_config
from mmlinglo.utils.files import complete_file

METRIC = 'accuracy/top1'
CONFIG = 'configs/cifar10/{}_1xb128-30e_cifar10.py'
FOLDER_DATA = 'configs/_base_/datasets/cifar10_folder_bs128_96.py'


def campaign_parser(description: str, name: str, seeds: List[int]) -> argparse.ArgumentParser:
    """Parser with the arguments of any campaign on CIFAR-10."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--seeds', nargs='+', type=int, default=seeds, help='default: %(default)s')
    add('--epochs', type=int, help="2 or more; default: the configs'")
    text = 'of the training set, in (0, 1]: the first images of each class; default: 1'
    add('--fraction', type=float, default=1.0, help=text)
    add('--test-fraction', type=float, default=1.0, help='the same of the test set; default: 1')
    add('--data-root', help="default: the configs', data/cifar10")
    text = 'default: its own pickles, downloaded if missing; or {train,test}/<class>/ with pictures'
    add('--data-format', choices=['cifar', 'folder'], default='cifar', help=text)
    text = 'further settings, for all rows'
    add('--cfg-options', nargs='+', type=key_value, action=DictAction, help=text)
    add('--work-dir', default=f'work_dirs/{name}_cifar10', help='default: %(default)s')
    text = 'path of the results, without suffix; default: %(default)s'
    add('--out', default=f'work_dirs/analysis/run_{name}', help=text)
    return parser


def make_config(
    root: Path, row: str, args: argparse.Namespace, epochs: Optional[int] = None
) -> Config:
    """Settings of a row's trainings, with all images.

    Args:
        root: The checkout.
        row: A key of :data:`~mmlinglo.analysis.ablations.ROWS`.
        args: From :func:`campaign_parser`.
        epochs: Instead of those of ``args``.

    Raises:
        UsageError: If ``args`` do not fit the config.
    """
    cfg = load_config(str(root / CONFIG.format(row)))
    if args.data_format == 'folder':
        for key, value in Config.fromfile(root / FOLDER_DATA).items():
            cfg[key] = value
    try:
        cfg.merge_from_dict(args.cfg_options or {})
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f'--cfg-options do not fit {cfg.filename!r}: {error}') from error
    cfg.train_cfg.max_epochs = epochs or args.epochs or cfg.train_cfg.max_epochs
    if cfg.train_cfg.max_epochs < 2:
        raise UsageError(
            f'epochs must be at least 2, of which the first is for warming up, got '
            f'{cfg.train_cfg.max_epochs}'
        )
    if args.data_root is not None:
        for name in ('train', 'val', 'test'):
            cfg[f'{name}_dataloader'].dataset.data_root = args.data_root
    return cfg


def train_all(root: Path, configs: Dict[Path, Config]) -> Iterator[Tuple[Path, str]]:
    """Train what is not finished; yield the path of each training's settings, and how it ended.

    That is ``''`` for one that was trained now, otherwise ``'finished before'``, ``'failed'`` or ``'left'``.
    """
    for path, cfg in configs.items():
        keep_settings(cfg, path)
    for number, path in enumerate(configs, 1):
        work_dir, start = path.with_suffix(''), time.time()
        sys.stdout.write(f'[{number}/{len(configs)}] {work_dir}: ')
        sys.stdout.flush()  # before the minutes of a training
        with lock(path.with_suffix('.lock')) as locked:
            how = 'finished before' if locked and is_finished(path) else ''
            if locked is None:
                how, text = 'left', 'left to another campaign, or to a training that it left behind'
            elif not how and not train(root / 'tools/train.py', path, locked):
                how, text = 'failed', f'failed, see {work_dir}/train.log'
            else:
                top1 = read_run(work_dir).value.iloc[-1]
                text = f'top-1 {top1:.2f} % ({how or f"{time.time() - start:.0f} s"})'
        sys.stdout.write(f'{text}\n')
        yield path, how


def read_runs(configs: Dict[Path, Config]) -> pd.DataFrame:
    """Accuracy of the finished trainings: columns ``row``, ``run``, ``step``, ``value``."""
    frames = [pd.DataFrame(columns=['row', 'run', 'step', 'value'])]
    for path in filter(is_finished, configs):
        run = read_run(path.with_suffix(''))
        frames.append(run.assign(row=path.parent.name, run=path.stem))
    return pd.concat(frames[1:] or frames, ignore_index=True)


def count_images(
    configs: Iterable[Config], fraction: float = 1.0, test_fraction: float = 1.0
) -> Dict[str, int]:
    """Cut the data sets of configs, all the same, to a share of each class, in place, and count the images.

    The first images of each class are kept, at least one. CIFAR-10's pickles are downloaded if they are missing.

    Args:
        configs: Configs for mmpretrain.
        fraction: Share of the training set, in (0, 1].
        test_fraction: Share of the test set, which is also the validation set.

    Returns:
        Images of the training set, ``train``, and of the test set, ``test``.

    Raises:
        ValueError: If the data cannot be read, a share is out of range, or there are too few for the batch.
    """
    first, *others = configs
    init_default_scope(first.default_scope)
    images = {}
    for name, share in dict(train=fraction, test=test_fraction).items():
        if not 0 < share <= 1:
            raise ValueError(f'the fraction of a data set must be in (0, 1], got {share}')
        try:
            dataset = DATASETS.build(first[f'{name}_dataloader'].dataset)
            labels = pd.Series(dataset.get_gt_labels())
        except Exception as error:  # each data set, and the download, has its own kinds
            raise ValueError(
                f'the data cannot be read ({type(error).__name__}: {error}): give their folder, '
                "with CIFAR-10's pickles or, in the folder format, pictures in "
                '{train,test}/<class>/'
            ) from error
        by_class = labels.groupby(labels)
        kept = (share * by_class.transform('size')).round().clip(lower=1)
        indices = labels.index[by_class.cumcount() < kept].tolist()
        images[name] = len(indices)
        for cfg in (first, *others) if share != 1 else ():
            for loader in (name, 'val') if name == 'test' else (name,):
                cfg[f'{loader}_dataloader'].dataset.indices = indices
    batch_size = first.train_dataloader.batch_size
    if images['train'] < 2 * batch_size:  # the warm-up needs two steps
        raise ValueError(
            f'{images["train"]} training images are less than two batches of {batch_size}: take '
            'a larger fraction, or a smaller train_dataloader.batch_size'
        )
    return images


@contextmanager
def lock(path: Path) -> Iterator[Optional[int]]:
    """Take a training, so that no other campaign does.

    Yields:
        File descriptor of the locked file; a process that inherits it keeps the file locked as long as it
        lives. None if another process has locked it.
    """
    with open(path, 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file.fileno()


def keep_settings(cfg: Config, path: Path) -> None:
    """Write a training's settings to a ``.py`` file, or make sure that those written are the same.

    Raises:
        ValueError: If the file has other settings, or is missing beside a work dir.
    """
    if path.exists():
        changed = Config.diff(str(path), Config.fromstring(cfg.pretty_text, '.py')).strip()
        if changed:
            raise ValueError(
                f'{str(path)!r} was made with other settings (-) than these (+). Ask for the same '
                f'ones, or name another folder\n{changed}'
            )
    elif path.with_suffix('').exists():
        raise ValueError(
            f'{str(path.with_suffix(""))!r} is there without its settings, {path.name}: name '
            'another folder'
        )
    else:
        with complete_file(path) as file:
            file.write_text(cfg.pretty_text)


def train(program: Path, settings: Path, locked: int) -> bool:
    """Start a training, or go on with it from its last validated epoch, and wait for its end.

    Its output goes to ``train.log`` in its work dir; of its checkpoints the last one remains. When this
    process is interrupted, so is the training. When it is killed, the training goes on, and remains locked.

    Args:
        program: ``tools/train.py``.
        settings: The file of :func:`keep_settings`.
        locked: File descriptor from :func:`lock`.

    Returns:
        Whether it ended well.
    """
    work_dir = settings.with_suffix('')
    work_dir.mkdir(exist_ok=True)
    command = [sys.executable, str(program), str(settings), '--work-dir', str(work_dir)]
    checkpoint = checkpoint_to_resume(work_dir)
    if checkpoint is not None:
        command += ['--resume', str(checkpoint)]
    with open(work_dir / 'train.log', 'a') as log:
        how: Dict[str, Any] = dict(pass_fds=[locked], start_new_session=True)
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **how)
        try:
            process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes of its data loaders
            process.wait()
            raise
    if not is_finished(settings):
        return False
    for other in set(work_dir.glob('epoch_*.pth')) - {checkpoint_to_resume(work_dir)}:
        other.unlink()
    return True


def read_run(work_dir: Path) -> pd.DataFrame:
    """Top-1 accuracy in percent, ``value``, after each validated epoch, ``step``; empty if there is none.

    Raises:
        ValueError: If a log is damaged.
    """
    logs = [log.read_text() for log in work_dir.glob('*/vis_data/scalars.json')]
    if not any(METRIC in log.rpartition('\n')[0] for log in logs):
        return pd.DataFrame(dict(step=[], value=[]))
    return read_scalars(work_dir, METRIC)


def checkpoint_to_resume(work_dir: Path) -> Optional[Path]:
    """Checkpoint of the last epoch that was also validated, or None.

    Going on from a later one would leave its epoch without a point on the curve.
    """
    epochs = read_run(work_dir).step.astype(int)
    paths = [work_dir / f'epoch_{epoch}.pth' for epoch in epochs[::-1]]
    return next((path for path in paths if path.is_file()), None)


def is_finished(settings: Path) -> bool:
    """Whether checkpoint and accuracy of a training's last epoch are there."""
    if not settings.exists():
        return False
    last = f'epoch_{Config.fromfile(settings).train_cfg.max_epochs}.pth'
    checkpoint = checkpoint_to_resume(settings.with_suffix(''))
    return checkpoint is not None and checkpoint.name == last

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Train the paper's ablations and two peers on CIFAR-10, one after another, and compare their order with the paper's.

An interrupted campaign, started again with the same arguments, goes on where it stopped: what is
finished is skipped, and a training goes on from its last validated epoch (with other random numbers
than without the interruption). Whenever a training is finished, the table (<out>.json, .csv, .md),
the orders (<out>_orders.json, .csv) and the curves (<out>.png) are written anew.

The same command may run several times at once and share the work, each on a GPU of its own
(CUDA_VISIBLE_DEVICES) or a core of its own (OMP_NUM_THREADS=1).
"""

import argparse
import copy
import itertools
import signal
import sys
import time
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

import pandas as pd
import torch
from mmengine.config import Config, DictAction

from mmlinglo.analysis import ablations
from mmlinglo.analysis.report import provenance
from mmlinglo.utils.cli import UsageError, load_config, run

ROOT = Path(__file__).resolve().parents[2]
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
    add('--cfg-options', nargs='+', action=DictAction, help=text)
    add('--work-dir', default=f'work_dirs/{name}_cifar10', help='default: %(default)s')
    text = 'path of the results, without suffix; default: %(default)s'
    add('--out', default=f'work_dirs/analysis/run_{name}', help=text)
    return parser


def make_config(row: str, args: argparse.Namespace, epochs: Optional[int] = None) -> Config:
    """Settings of a row's trainings, with all images."""
    cfg = load_config(str(ROOT / CONFIG.format(row)))
    if args.data_format == 'folder':
        for key, value in Config.fromfile(ROOT / FOLDER_DATA).items():
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
    for name in ('train', 'val', 'test'):
        if args.data_root is not None:
            cfg[f'{name}_dataloader'].dataset.data_root = args.data_root
    return cfg


def train_all(configs: Dict[Path, Config]) -> Iterator[Tuple[Path, str]]:
    """Train what is not finished; yield the path of each training's settings, and how it ended.

    That is ``''`` for one that was trained now, otherwise ``'finished before'``, ``'failed'`` or ``'left'``.
    """
    for path, cfg in configs.items():
        ablations.keep_settings(cfg, path)
    for number, path in enumerate(configs, 1):
        work_dir, start = path.with_suffix(''), time.time()
        print(f'[{number}/{len(configs)}] {work_dir}: ', end='', flush=True)
        with ablations.lock(path.with_suffix('.lock')) as locked:
            how = 'finished before' if locked and ablations.is_finished(path) else ''
            if locked is None:
                how, text = 'left', 'left to another campaign, or to a training that it left behind'
            elif not how and not ablations.train(ROOT / 'tools/train.py', path, locked):
                how, text = 'failed', f'failed, see {work_dir}/train.log'
            else:
                top1 = ablations.read_run(work_dir).value.iloc[-1]
                text = f'top-1 {top1:.2f} % ({how or f"{time.time() - start:.0f} s"})'
        print(text)
        yield path, how


def read_runs(configs: Dict[Path, Config]) -> pd.DataFrame:
    """Accuracy of the finished trainings: columns ``row``, ``run``, ``step``, ``value``."""
    frames = [pd.DataFrame(columns=['row', 'run', 'step', 'value'])]
    for path in filter(ablations.is_finished, configs):
        run = ablations.read_run(path.with_suffix(''))
        frames.append(run.assign(row=path.parent.name, run=path.stem))
    return pd.concat(frames[1:] or frames, ignore_index=True)


def main(argv: Optional[List[str]] = None) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('error: terminated'))
    try:
        failed = run_campaign(parse_args(argv))
    except ValueError as error:
        raise UsageError(f'{error}') from error
    if failed:
        raise UsageError(f'{len(failed)} trainings failed: {", ".join(failed)}')
    return 0


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = campaign_parser(__doc__, 'ablations', [0, 1])
    rows = list(ablations.ROWS)
    parser.add_argument('--rows', nargs='+', choices=rows, default=rows, help='default: all')
    return parser.parse_args(argv)


def run_campaign(args: argparse.Namespace) -> List[str]:
    """Train what is not finished yet; return the work dirs of the trainings that failed."""
    by_row = {row: make_config(row, args) for row in args.rows}
    cfg = by_row[args.rows[0]]
    images = ablations.count_images(by_row.values(), args.fraction, args.test_fraction)
    params_m = {row: ablations.count_parameters(cfg) for row, cfg in by_row.items()}
    configs = {}
    for seed, row in itertools.product(args.seeds, args.rows):
        configs[Path(args.work_dir, row, f'seed{seed}.py')] = settings = copy.deepcopy(by_row[row])
        settings.randomness = dict(seed=seed)

    def write_results() -> str:
        settings = dict(epochs=cfg.train_cfg.max_epochs, batch_size=cfg.train_dataloader.batch_size)
        heading = (
            'CIFAR-10: {train} training and {test} test images, {epochs} epochs, batch '
            '{batch_size}'.format(**images, **settings)
        )
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
        source = provenance(device, **settings, images=images, seeds=args.seeds)
        return ablations.write_results(args.out, read_runs(configs), params_m, heading, source)

    failed = []
    for path, how in train_all(configs):
        if how == 'failed':
            failed.append(str(path.with_suffix('')))
        elif not how:
            write_results()
    print(f'\n{write_results()}\n')
    print(f'{args.out}.md, .json, .csv, .png and {args.out}_orders.json, .csv')
    return failed


if __name__ == '__main__':
    run(main)

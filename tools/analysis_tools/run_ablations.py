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
import signal
import sys
import time
from pathlib import Path
from typing import List

import torch
from mmengine.config import Config, DictAction

from mmlinglo.analysis import ablations
from mmlinglo.analysis.report import provenance
from mmlinglo.utils.cli import UsageError, load_config, run

ROOT = Path(__file__).resolve().parents[2]
CONFIG = 'configs/cifar10/{}_1xb128-30e_cifar10.py'
FOLDER_DATA = 'configs/_base_/datasets/cifar10_folder_bs128_96.py'


def parse_args() -> argparse.Namespace:
    parser = campaign_parser(__doc__)
    rows = list(ablations.ROWS)
    parser.add_argument('--rows', nargs='+', choices=rows, default=rows, help='default: all')
    return parser.parse_args()


def campaign_parser(description: str) -> argparse.ArgumentParser:
    """Parser with the arguments of any campaign on CIFAR-10."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1], help='default: %(default)s')
    parser.add_argument('--epochs', type=int, help="2 or more; default: the configs'")
    parser.add_argument(
        '--fraction',
        type=float,
        default=1.0,
        help='of the training set, in (0, 1]: the first images of each class; default: 1',
    )
    parser.add_argument(
        '--test-fraction', type=float, default=1.0, help='the same of the test set; default: 1'
    )
    parser.add_argument('--data-root', help="default: the configs', data/cifar10")
    parser.add_argument(
        '--data-format',
        choices=['cifar', 'folder'],
        default='cifar',
        help="the set's own pickles (default; downloaded if missing), or {train,test}/<class>/ "
        'with pictures',
    )
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='further settings, for all rows'
    )
    parser.add_argument(
        '--work-dir', default='work_dirs/ablations_cifar10', help='default: %(default)s'
    )
    parser.add_argument(
        '--out',
        default='work_dirs/analysis/run_ablations',
        help='path of the results, without suffix; default: %(default)s',
    )
    return parser


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('error: terminated'))
    try:
        failed = run_campaign(args)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if failed:
        sys.exit(f'error: {len(failed)} trainings failed: {", ".join(failed)}')


def run_campaign(args: argparse.Namespace) -> List[str]:
    """Train what is not finished yet; return the work dirs of the trainings that failed."""
    configs = {
        Path(args.work_dir, row, f'seed{seed}.py'): make_config(row, seed, args)
        for seed in args.seeds
        for row in args.rows
    }
    cfg = next(iter(configs.values()))
    images = ablations.count_images(cfg)
    params_m = {
        row: ablations.count_parameters(
            configs[Path(args.work_dir, row, f'seed{args.seeds[0]}.py')]
        )
        for row in args.rows
    }

    def write_results() -> str:
        runs: ablations.Runs = {row: [] for row in args.rows}
        for path in filter(ablations.is_finished, configs):
            runs[path.parent.name].append(ablations.read_run(path.with_suffix('')))
        settings = dict(epochs=cfg.train_cfg.max_epochs, batch_size=cfg.train_dataloader.batch_size)
        heading = (
            'CIFAR-10: {train} training and {test} test images, {epochs} epochs, batch '
            '{batch_size}'.format(**images, **settings)
        )
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
        source = provenance(device, torch.float32, **settings, images=images, seeds=args.seeds)
        return ablations.write_results(Path(args.out), runs, params_m, heading, source)

    for path, settings in configs.items():
        ablations.keep_settings(settings, path)
    failed = []
    for number, path in enumerate(configs, 1):
        work_dir, start = path.with_suffix(''), time.time()
        print(f'[{number}/{len(configs)}] {work_dir}: ', end='', flush=True)
        with ablations.lock(path.with_suffix('.lock')) as locked:
            if locked is None:
                print('left to another campaign, or to a training that it left behind')
                continue
            how = 'finished before'
            if not ablations.is_finished(path):
                if not ablations.train(ROOT / 'tools/train.py', path, locked):
                    print(f'failed, see {work_dir}/train.log')
                    failed.append(str(work_dir))
                    continue
                how = f'{time.time() - start:.0f} s'
                write_results()
            print(f'top-1 {ablations.read_run(work_dir)[-1][1]:.2f} % ({how})')
    print(f'\n{write_results()}\n')
    print(f'{args.out}.md, .json, .csv, .png and {args.out}_orders.json, .csv')
    return failed


def make_config(row: str, seed: int, args: argparse.Namespace) -> Config:
    """Settings of one training."""
    cfg = load_config(str(ROOT / CONFIG.format(row)))
    if args.data_format == 'folder':
        for key, value in Config.fromfile(ROOT / FOLDER_DATA).items():
            cfg[key] = value
    try:
        cfg.merge_from_dict(args.cfg_options or {})
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f'--cfg-options do not fit {cfg.filename!r}: {error}') from error
    ablations.set_training(
        cfg, seed, args.epochs, args.data_root, args.fraction, args.test_fraction
    )
    return cfg


if __name__ == '__main__':
    run(main)

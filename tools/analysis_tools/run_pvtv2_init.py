# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Does PVTv2's training help LinGlo? An experiment on CIFAR-10.

For each seed PVTv2-B0 is trained, converted to LinGlo-b0 (tools/model_converters/pvtv2_to_linglo.py),
evaluated, and trained further for a tenth of the epochs; and LinGlo-b0 is trained from scratch for as
many. The table (<out>.json, .csv, .md) is written after each. It goes on as run_ablations.py does.
"""

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import List, Optional

import pandas as pd
import torch

from mmlinglo.analysis import ablations, campaign
from mmlinglo.analysis.ablations import CONVERTED, FURTHER, PVTV2, SCRATCH
from mmlinglo.analysis.report import provenance
from mmlinglo.utils.cli import UsageError, run

ROOT = Path(__file__).resolve().parents[2]


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = campaign.campaign_parser(__doc__, 'pvtv2_init', [0, 1, 2])
    add = parser.add_argument
    text = "of LinGlo-b0, from PVTv2 and from scratch, 2 or more; default: a tenth of PVTv2-B0's"
    add('--further-epochs', type=int, help=text)
    add('--images', type=int, default=512, help='for the conversion; default: %(default)s')
    add('--steps', type=int, default=200, help='of each fit in it; default: %(default)s')
    return parser.parse_args(argv)


def run_experiment(args: argparse.Namespace) -> None:
    work_dir = Path(args.work_dir).absolute()
    pvtv2 = campaign.make_config(ROOT, PVTV2, args)
    epochs = pvtv2.train_cfg.max_epochs
    further = epochs // 10 if args.further_epochs is None else args.further_epochs
    if further < 2:
        raise UsageError(
            f'LinGlo-b0 needs at least 2 epochs, got {further}: take more --epochs, or --further-epochs'
        )
    configs, images = {}, {}
    for seed in args.seeds:
        trainings = {
            PVTV2: campaign.make_config(ROOT, PVTV2, args),
            FURTHER: campaign.make_config(ROOT, SCRATCH, args, further),
            SCRATCH: campaign.make_config(ROOT, SCRATCH, args, further),
        }
        images = campaign.count_images(trainings.values(), args.fraction, args.test_fraction)
        checkpoint = str(work_dir / CONVERTED / f'seed{seed}.pth')
        for part in ('backbone', 'head'):
            init_cfg = dict(type='Pretrained', checkpoint=checkpoint, prefix=f'{part}.')
            trainings[FURTHER].model[part].init_cfg = init_cfg
        for row, cfg in trainings.items():
            cfg.randomness = dict(seed=seed)
            configs[work_dir / row / f'seed{seed}.py'] = cfg
    more = dict(images=images, batch_size=pvtv2.train_dataloader.batch_size)
    more['conversion'] = dict(images=args.images, steps=args.steps)
    all_epochs = {PVTV2: epochs, CONVERTED: 0, FURTHER: further, SCRATCH: further}

    def write_results() -> str:
        runs = campaign.read_runs(configs).sort_values('step')
        last = runs.groupby(['row', 'run'], as_index=False).last()
        seeds = [f'seed{seed}' for seed in args.seeds]
        converted = [(seed, converted_top1(work_dir / CONVERTED / seed)) for seed in seeds]
        found = [(CONVERTED, seed, top1) for seed, top1 in converted if top1 is not None]
        last = pd.concat([last, pd.DataFrame(found, columns=['row', 'run', 'value'])])
        source = provenance('cuda' if torch.cuda.is_available() else 'cpu', **more)
        return ablations.write_starts(args.out, last, all_epochs, seeds, source)

    for path, how in campaign.train_all(ROOT, configs):
        if how in ('failed', 'left'):
            raise UsageError(f'{path.with_suffix("")} is not finished: start the command again')
        if path.parent.name == PVTV2:
            convert(path, epochs, args)
        write_results()
    print(f'\n{write_results()}\n\n{args.out}.md, .json, .csv')


def convert(pvtv2: Path, epochs: int, args: argparse.Namespace) -> None:
    """Convert PVTv2-B0 after its last epoch, and evaluate the result, unless this has been done."""
    folder, seed = pvtv2.parents[1] / CONVERTED, pvtv2.stem
    out, settings = folder / f'{seed}.pth', pvtv2.parents[1] / FURTHER / pvtv2.name
    source = pvtv2.with_suffix('') / f'epoch_{epochs}.pth'
    options = ['--images', args.images, '--steps', args.steps, '--seed', seed.removeprefix('seed')]
    commands = [
        ['tools/model_converters/pvtv2_to_linglo.py', settings, source, out, *options],
        ['tools/test.py', settings, out, '--work-dir', folder / seed],
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for command in commands[out.exists() :] if converted_top1(folder / seed) is None else ():
        with open(folder / f'{seed}.log', 'a') as file:
            program = [sys.executable, str(ROOT / command[0]), *map(str, command[1:])]
            if subprocess.run(program, stdout=file, stderr=subprocess.STDOUT).returncode:
                raise UsageError(f'the conversion failed, see {file.name}')
    print(f'{CONVERTED}, {seed}: top-1 {converted_top1(folder / seed):.2f} %')


def converted_top1(work_dir: Path) -> Optional[float]:
    """Accuracy that tools/test.py wrote; None if it has not run to its end."""
    logs = sorted(work_dir.glob('*/*.json'))
    return json.loads(logs[0].read_text())[campaign.METRIC] if logs else None


def main(argv: Optional[List[str]] = None) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('error: terminated'))
    try:
        run_experiment(parse_args(argv))
    except ValueError as error:
        raise UsageError(f'{error}') from error
    return 0


if __name__ == '__main__':
    run(main)

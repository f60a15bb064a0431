# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Does PVTv2's training help LinGlo? An experiment on CIFAR-10.

For each seed, the tool trains PVTv2-B0, converts it to LinGlo-b0 (tools/model_converters/pvtv2_to_linglo.py),
evaluates the result, and trains it for another tenth of the epochs, at least two. It also trains LinGlo-b0 from
scratch for as many epochs. After each training, it writes the table (<out>.json, .csv, .md). After an interruption,
it continues as run_ablations.py does.
"""

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import List, Optional

import torch

from mmlinglo.analysis import ablations, campaign
from mmlinglo.analysis.ablations import CONVERTED, FURTHER, PVTV2, SCRATCH
from mmlinglo.analysis.report import explain_errors, provenance
from mmlinglo.utils.cli import UsageError, run

ROOT = Path(__file__).resolve().parents[2]


def run_experiment(args: argparse.Namespace) -> None:
    work_dir = Path(args.work_dir).absolute()
    pvtv2 = campaign.make_config(ROOT, PVTV2, args)
    epochs = pvtv2.train_cfg.max_epochs
    further = max(2, epochs // 10)
    all_epochs = {PVTV2: epochs, CONVERTED: 0, FURTHER: further, SCRATCH: further}
    seeds = [f'seed{seed}' for seed in args.seeds]
    configs = {}
    for seed, name in zip(args.seeds, seeds):
        start = dict(type='Pretrained', checkpoint=str(work_dir / CONVERTED / f'{name}.pth'))
        for row, source in ((PVTV2, PVTV2), (FURTHER, SCRATCH), (SCRATCH, SCRATCH)):
            cfg = campaign.make_config(ROOT, source, args, all_epochs[row])
            cfg.randomness = dict(seed=seed)
            if row == FURTHER:
                for part in ('backbone', 'head'):
                    cfg.model[part].init_cfg = dict(start, prefix=f'{part}.')
            configs[work_dir / row / f'{name}.py'] = cfg
    more = dict(
        images=campaign.count_images(configs.values(), args.fraction, args.test_fraction),
        batch_size=pvtv2.train_dataloader.batch_size,
        conversion=dict(steps=args.steps),
    )

    def write_results() -> str:
        last = campaign.read_runs(configs).sort_values('step').groupby(['row', 'run']).last()
        for name in seeds:
            top1 = converted_top1(work_dir / CONVERTED / name)
            if top1 is not None:
                last.loc[(CONVERTED, name), 'value'] = top1
        source = provenance('cuda' if torch.cuda.is_available() else 'cpu', **more)
        return ablations.write_starts(args.out, last.reset_index(), all_epochs, seeds, source)

    for path, how in campaign.train_all(ROOT, configs):
        if how in ('failed', 'left'):
            raise UsageError(f'{path.with_suffix("")} is not finished: start the command again')
        if path.parent.name == PVTV2:
            convert(path, epochs, args)
        write_results()
    print(f'\n{write_results()}\n\n{args.out}.md, .json, .csv')


def convert(pvtv2: Path, epochs: int, args: argparse.Namespace) -> None:
    """Convert PVTv2-B0 after its last epoch and evaluate the result, unless both are done."""
    folder, seed = pvtv2.parents[1] / CONVERTED, pvtv2.stem
    out, settings = folder / f'{seed}.pth', pvtv2.parents[1] / FURTHER / pvtv2.name
    source = pvtv2.with_suffix('') / f'epoch_{epochs}.pth'
    options = ['--steps', args.steps, '--seed', seed.removeprefix('seed')]
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
    """Read the accuracy that tools/test.py wrote. None if it has not finished."""
    logs = sorted(work_dir.glob('*/*.json'))
    return json.loads(logs[0].read_text())[campaign.METRIC] if logs else None


def main(argv: Optional[List[str]] = None) -> int:
    parser = campaign.campaign_parser(__doc__, 'pvtv2_init', [0, 1, 2])
    text = 'gradient steps of each fit in the conversion; default: %(default)s'
    parser.add_argument('--steps', type=int, default=200, help=text)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('error: terminated'))
    with explain_errors():
        run_experiment(parser.parse_args(argv))
    return 0


if __name__ == '__main__':
    run(main)

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Does PVTv2's training help LinGlo? An experiment on CIFAR-10.

For each seed PVTv2-B0 is trained, converted to LinGlo-b0 (tools/model_converters/pvtv2_to_linglo.py),
evaluated, and trained further for a tenth of the epochs; and LinGlo-b0 is trained from scratch for
as many. The table (<out>.json, .csv, .md) is written whenever a training is finished. What is
finished is skipped when the same command is started again, as in run_ablations.py; the command may
also run several times at once.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Optional

import torch
from mmengine.config import Config
from run_ablations import ROOT, campaign_parser, make_config

from mmlinglo.analysis import ablations
from mmlinglo.analysis.report import format_table, provenance, with_suffix, write_report
from mmlinglo.utils.cli import UsageError, run

CONVERTED, FURTHER, SCRATCH = 'linglo-b0_converted', 'linglo-b0_pvtv2-init', 'linglo-b0'
PVTV2 = 'pvtv2-b0'
Accuracies = Dict[str, List[float]]  # top-1 in percent of each row, one for each finished seed


def parse_args() -> argparse.Namespace:
    parser = campaign_parser(__doc__)
    parser.add_argument(
        '--further-epochs',
        type=int,
        help='of LinGlo-b0, both from PVTv2 and from scratch, 2 or more; default: a tenth of '
        "PVTv2-B0's --epochs",
    )
    parser.add_argument(
        '--images', type=int, default=512, help='for the conversion; default: %(default)s'
    )
    parser.add_argument(
        '--steps',
        type=int,
        default=200,
        help='of each fit in the conversion; default: %(default)s',
    )
    parser.set_defaults(
        seeds=[0, 1, 2],
        work_dir='work_dirs/pvtv2_init_cifar10',
        out='work_dirs/analysis/run_pvtv2_init',
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('error: terminated'))
    try:
        Experiment(args).run()
    except ValueError as error:
        raise UsageError(str(error)) from error


class Experiment:
    """The trainings and their results.

    Args:
        args: From :func:`parse_args`.

    Raises:
        ValueError: If the settings are wrong, or the data cannot be read.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work_dir = Path(args.work_dir).absolute()
        pvtv2 = make_config(PVTV2, args.seeds[0], args)
        self.batch_size = pvtv2.train_dataloader.batch_size
        self.epochs = {PVTV2: pvtv2.train_cfg.max_epochs, CONVERTED: 0}
        further = args.further_epochs
        if further is None:
            further = self.epochs[PVTV2] // 10
        if further < 2:
            raise ValueError(
                f'LinGlo-b0 needs at least 2 epochs, of which the first is for warming up, got '
                f'{further}: take more --epochs, or --further-epochs'
            )
        self.epochs.update({FURTHER: further, SCRATCH: further})
        self.images = ablations.count_images(pvtv2)

    def run(self) -> None:
        for seed in self.args.seeds:
            for row in (PVTV2, FURTHER, SCRATCH):
                ablations.keep_settings(self.settings(row, seed), self.path(row, seed, '.py'))
        for seed in self.args.seeds:
            self.train(PVTV2, seed)
            self.convert(seed)
            self.train(FURTHER, seed)
            self.train(SCRATCH, seed)
        print(f'\n{self.write_results()}\n\n{self.args.out}.md, .json, .csv')

    def path(self, row: str, seed: int, suffix: str = '') -> Path:
        return self.work_dir / row / f'seed{seed}{suffix}'

    def settings(self, row: str, seed: int) -> Config:
        """Config of one training."""
        source = PVTV2 if row == PVTV2 else SCRATCH
        args = argparse.Namespace(**{**vars(self.args), 'epochs': self.epochs[row]})
        cfg = make_config(source, seed, args)
        if row == FURTHER:
            checkpoint = str(self.path(CONVERTED, seed, '.pth'))
            for part in ('backbone', 'head'):
                cfg.model[part].init_cfg = dict(
                    type='Pretrained', checkpoint=checkpoint, prefix=f'{part}.'
                )
        return cfg

    def train(self, row: str, seed: int) -> None:
        path = self.path(row, seed, '.py')
        print(f'{row}, seed {seed}, {self.epochs[row]} epochs: ', end='', flush=True)
        with ablations.lock(path.with_suffix('.lock')) as locked:
            if locked is None:
                sys.exit('error: another campaign trains it; start this one again when it is done')
            if not ablations.is_finished(path):
                if not ablations.train(ROOT / 'tools/train.py', path, locked):
                    sys.exit(f'error: failed, see {path.with_suffix("")}/train.log')
                self.write_results()
        print(f'top-1 {self.accuracy(row, seed):.2f} %')

    def convert(self, seed: int) -> None:
        """Convert PVTv2-B0 after its last epoch, and evaluate the result."""
        out, log = (self.path(CONVERTED, seed, suffix) for suffix in ('.pth', '.log'))
        print(f'{CONVERTED}, seed {seed}: ', end='', flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        settings = self.path(FURTHER, seed, '.py')
        source = self.path(PVTV2, seed) / f'epoch_{self.epochs[PVTV2]}.pth'
        options = [
            *('--images', self.args.images),
            *('--steps', self.args.steps),
            *('--seed', seed),
        ]
        commands = [
            ['tools/model_converters/pvtv2_to_linglo.py', settings, source, out, *options],
            ['tools/test.py', settings, out, '--work-dir', self.path(CONVERTED, seed)],
        ]
        with ablations.lock(out.with_suffix('.lock')) as locked:
            if locked is None:
                sys.exit(
                    'error: another campaign converts it; start this one again when it is done'
                )
            if out.exists():
                commands = commands[1:]
            if self.accuracy(CONVERTED, seed) is None:
                for command in commands:
                    with open(log, 'a') as file:
                        program = [sys.executable, str(ROOT / command[0]), *map(str, command[1:])]
                        done = subprocess.run(program, stdout=file, stderr=subprocess.STDOUT)
                    if done.returncode:
                        sys.exit(f'error: failed, see {log}')
                self.write_results()
        print(f'top-1 {self.accuracy(CONVERTED, seed):.2f} %')

    def accuracy(self, row: str, seed: int) -> Optional[float]:
        """Top-1 in percent on the test images after the last epoch; None if it is not finished."""
        if row == CONVERTED:
            for log in sorted(self.path(row, seed).glob('*/*.json')):
                return json.loads(log.read_text())[ablations.METRIC]
            return None
        if not ablations.is_finished(self.path(row, seed, '.py')):
            return None
        return ablations.read_run(self.path(row, seed))[-1][1]

    def write_results(self) -> str:
        """Write the table; return it as Markdown."""
        rows = []
        found = {
            row: {seed: self.accuracy(row, seed) for seed in self.args.seeds} for row in self.epochs
        }
        for row, epochs in self.epochs.items():
            top1 = [value for value in found[row].values() if value is not None]
            rows.append(
                dict(
                    row=row,
                    epochs=epochs,
                    seeds=len(top1),
                    top1_mean=statistics.fmean(top1) if top1 else None,
                    top1_min=min(top1, default=None),
                    top1_max=max(top1, default=None),
                    **{f'seed{seed}': value for seed, value in found[row].items()},
                )
            )
        source = provenance(
            'cuda' if torch.cuda.is_available() else 'cpu',
            torch.float32,
            images=self.images,
            batch_size=self.batch_size,
            conversion=dict(images=self.args.images, steps=self.args.steps),
        )
        out = Path(self.args.out)
        write_report(out, rows, source)
        columns = dict(row='Model', epochs='Epochs', seeds='Seeds', top1_mean='Top-1 (%), mean')
        columns.update(top1_min='lowest', top1_max='highest')
        columns.update({f'seed{seed}': f'seed {seed}' for seed in self.args.seeds})
        text = '\n\n'.join(
            [
                '# CIFAR-10: {train} training and {test} test images, batch {size}'.format(
                    **self.images, size=self.batch_size
                ),
                f'Top-1 accuracy on the test images. {CONVERTED}: PVTv2-B0 of the same seed, '
                f'converted, not trained; {FURTHER}: trained further from there; {SCRATCH}: from '
                'scratch.',
                format_table(rows, columns),
                compare(found[FURTHER], found[SCRATCH]),
                f'{source["date"]}, {source["device"]}, commit {source["commit"]}: '
                f'`{source["command"]}`',
            ]
        )
        with_suffix(out, '.md').write_text(text + '\n')
        return text


def compare(further: Dict[int, Optional[float]], scratch: Dict[int, Optional[float]]) -> str:
    """What the seeds that have both say of starting from PVTv2."""
    gains = [
        further[seed] - scratch[seed]
        for seed in further
        if further[seed] is not None and scratch[seed] is not None
    ]
    if not gains:
        return 'No seed is finished.'
    text = (
        f'From PVTv2 less from scratch, in percentage points: mean {statistics.fmean(gains):+.2f}, '
        f'by seed {", ".join(f"{gain:+.2f}" for gain in gains)}.'
    )
    if len(gains) < 2:
        return f'{text} One seed decides nothing.'
    if min(gains) > 0:
        return f'{text} It helped with every seed.'
    return f'{text} It {"helped with some seeds only" if max(gains) > 0 else "did not help"}.'


if __name__ == '__main__':
    run(main)

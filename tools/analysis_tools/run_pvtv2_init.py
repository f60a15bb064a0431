# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Does PVTv2's training help LinGlo? An experiment on CIFAR-10.

For each seed PVTv2-B0 is trained, converted to LinGlo-b0 (tools/model_converters/pvtv2_to_linglo.py),
evaluated, and trained further for a tenth of the epochs; and LinGlo-b0 is trained from scratch for as
many. The table (<out>.json, .csv, .md) is written whenever a training is finished. What is finished is
skipped when the same command is started again, as in run_ablations.py.
"""

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Optional

import pandas as pd
import torch
from run_ablations import ROOT, campaign_parser, make_config, read_runs, train_all

from mmlinglo.analysis import ablations
from mmlinglo.analysis.report import format_table, provenance, with_suffix, write_report
from mmlinglo.utils.cli import UsageError, run

PVTV2, CONVERTED = 'pvtv2-b0', 'linglo-b0_converted'
FURTHER, SCRATCH = 'linglo-b0_pvtv2-init', 'linglo-b0'


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = campaign_parser(__doc__, 'pvtv2_init', [0, 1, 2])
    add = parser.add_argument
    text = "of LinGlo-b0, from PVTv2 and from scratch, 2 or more; default: a tenth of PVTv2-B0's"
    add('--further-epochs', type=int, help=text)
    add('--images', type=int, default=512, help='for the conversion; default: %(default)s')
    text = 'of each fit in the conversion; default: %(default)s'
    add('--steps', type=int, default=200, help=text)
    return parser.parse_args(argv)


def run_experiment(args: argparse.Namespace) -> None:
    work_dir = Path(args.work_dir).absolute()
    pvtv2 = make_config(PVTV2, args)
    epochs = pvtv2.train_cfg.max_epochs
    further = epochs // 10 if args.further_epochs is None else args.further_epochs
    if further < 2:
        raise UsageError(
            f'LinGlo-b0 needs at least 2 epochs, of which the first is for warming up, got {further}: '
            'take more --epochs, or --further-epochs'
        )
    configs, images = {}, {}
    for seed in args.seeds:
        trainings = {
            PVTV2: make_config(PVTV2, args),
            FURTHER: make_config(SCRATCH, args, further),
            SCRATCH: make_config(SCRATCH, args, further),
        }
        images = ablations.count_images(trainings.values(), args.fraction, args.test_fraction)
        checkpoint = str(work_dir / CONVERTED / f'seed{seed}.pth')
        for part in ('backbone', 'head'):
            init_cfg = dict(type='Pretrained', checkpoint=checkpoint, prefix=f'{part}.')
            trainings[FURTHER].model[part].init_cfg = init_cfg
        for row, cfg in trainings.items():
            cfg.randomness = dict(seed=seed)
            configs[work_dir / row / f'seed{seed}.py'] = cfg
    batch_size = pvtv2.train_dataloader.batch_size
    more = dict(images=images, batch_size=batch_size)
    more['conversion'] = dict(images=args.images, steps=args.steps)
    all_epochs = {PVTV2: epochs, CONVERTED: 0, FURTHER: further, SCRATCH: further}
    for path, how in train_all(configs):
        if how in ('failed', 'left'):
            raise UsageError(f'{path.with_suffix("")} is not finished: start the command again')
        if path.parent.name == PVTV2:
            convert(path, epochs, args)
        write_results(args, read_runs(configs), all_epochs, more)
    print(f'\n{write_results(args, read_runs(configs), all_epochs, more)}\n')
    print(f'{args.out}.md, .json, .csv')


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
    return json.loads(logs[0].read_text())[ablations.METRIC] if logs else None


def write_results(
    args: argparse.Namespace, runs: pd.DataFrame, epochs: Dict[str, int], more: dict
) -> str:
    """Write the table; return it as Markdown."""
    last = runs.sort_values('step').groupby(['row', 'run'], as_index=False).last()
    seeds = [f'seed{seed}' for seed in args.seeds]
    folder = Path(args.work_dir, CONVERTED)
    converted = [
        dict(row=CONVERTED, run=seed, value=value)
        for seed in seeds
        if (value := converted_top1(folder / seed)) is not None
    ]
    last = pd.concat([last, pd.DataFrame(converted, columns=['row', 'run', 'value'])])
    by_seed = last.pivot(index='row', columns='run', values='value').reindex(columns=seeds)
    table = ablations.summarize(last, list(epochs)).join(by_seed)
    table.insert(0, 'epochs', list(epochs.values()))
    rows = [
        {key: None if pd.isna(value) else value for key, value in row.items()}
        for row in table.reset_index().astype(object).to_dict('records')
    ]
    source = provenance('cuda' if torch.cuda.is_available() else 'cpu', **more)
    write_report(args.out, rows, source)
    columns = dict(row='Model', epochs='Epochs', seeds='Seeds', top1_mean='Top-1 (%), mean')
    columns.update(top1_min='lowest', top1_max='highest', **{seed: seed for seed in seeds})
    gains = (table.loc[FURTHER, seeds] - table.loc[SCRATCH, seeds]).dropna().astype(float)
    text = '\n\n'.join(
        [
            '# CIFAR-10: {train} training and {test} test images'.format(**more['images']),
            f'Top-1 accuracy on the test images. {CONVERTED}: PVTv2-B0 of the same seed, converted, '
            f'not trained; {FURTHER}: trained further from there; {SCRATCH}: from scratch. Batches '
            f'of {more["batch_size"]}.',
            format_table(rows, columns),
            compare(gains.tolist()),
            '{date}, {device}, commit {commit}: `{command}`'.format(**source),
        ]
    )
    with_suffix(args.out, '.md').write_text(text + '\n')
    return text


def compare(gains: List[float]) -> str:
    """What the seeds that have both say of starting from PVTv2."""
    if not gains:
        return 'No seed is finished.'
    mean, by_seed = sum(gains) / len(gains), ', '.join(f'{gain:+.2f}' for gain in gains)
    text = (
        f'From PVTv2 less from scratch, in percentage points: mean {mean:+.2f}, by seed {by_seed}.'
    )
    if len(gains) < 2:
        return f'{text} One seed decides nothing.'
    if min(gains) > 0:
        return f'{text} It helped with every seed.'
    return f'{text} It {"helped with some seeds only" if max(gains) > 0 else "did not help"}.'


def main(argv: Optional[List[str]] = None) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('error: terminated'))
    try:
        run_experiment(parse_args(argv))
    except ValueError as error:
        raise UsageError(f'{error}') from error
    return 0


if __name__ == '__main__':
    run(main)

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Count LinGlo and the backbones of the paper's tables 2-4 alike, beside what the paper reports.

Each backbone that mmpretrain, mmdet or timm provides takes LinGlo's place in this package's
classifier, RetinaNet and SemanticFPN, with random weights; nothing is downloaded. Prints a table a
task and writes <out>.json, <out>.csv and <out>.png. What is counted, and how:
mmlinglo/analysis/complexity.py; LinGlo's attention is counted in the order in which it is executed.
"""

import argparse
from pathlib import Path
from typing import List

import torch

from mmlinglo.analysis.peers import TASKS, backbone_names, comparison_row, plot_comparison
from mmlinglo.analysis.report import format_table, provenance, with_suffix, write_report
from mmlinglo.utils.cli import UsageError, load_config, run

CONFIGS = Path(__file__).parents[2] / 'configs'
COUNTED = dict(
    params_m='params (M)',
    deployed_params_m='deployed (M)',
    macs_g='multiply-adds (G)',
    deployed_macs_g='deployed (G)',
    deployed_elementwise_g='other operations, deployed (G)',
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--task', choices=[*TASKS, 'all'], default='all')
    parser.add_argument(
        '--backbones', nargs='+', metavar='NAME', help='only these, such as LinGlo-b1 PVT-Tiny'
    )
    parser.add_argument(
        '--out',
        default='work_dirs/analysis/compare_backbones',
        help='where to write, without suffix; default: %(default)s',
    )
    return parser.parse_args()


def print_table(task: str, rows: List[dict]) -> None:
    print(f'\n{TASKS[task].title}')
    paper = {key: f'paper: {heading}' for key, heading in TASKS[task].columns.items()}
    print(format_table(rows, dict(backbone='backbone', **COUNTED, **paper)))
    for key, reason in (
        ('params_m', 'not counted, provided by none of the toolboxes'),
        ('paper_params_m', "not in the paper's table"),
    ):
        names = [row['backbone'] for row in rows if key not in row]
        if names:
            print(f'{", ".join(names)}: {reason}.')


def main() -> None:
    args = parse_args()
    tasks = list(TASKS) if args.task == 'all' else [args.task]
    known = list(dict.fromkeys(name for task in tasks for name in backbone_names(task)))
    wanted = args.backbones or known
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UsageError(f'--backbones: no {", ".join(unknown)}; there are {", ".join(known)}')

    rows = []
    for task in tasks:
        cfg = load_config(str(CONFIGS / TASKS[task].config))
        rows += [comparison_row(task, cfg, name) for name in backbone_names(task) if name in wanted]
    out = Path(args.out)
    shapes = {task: TASKS[task].shape for task in tasks}
    write_report(out, rows, provenance('cpu', torch.float32, shapes=shapes, batch_size=1))
    plot_comparison(rows, with_suffix(out, '.png'))
    for task in dict.fromkeys(row['task'] for row in rows):
        print_table(task, [row for row in rows if row['task'] == task])
    print(f'\nwritten: {out}.json, .csv and .png')


if __name__ == '__main__':
    run(main)

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Count LinGlo and the backbones of the paper's tables 2-4 alike, beside what the paper reports.

Each backbone that timm or mmdet provides takes LinGlo's place in this package's classifier, RetinaNet
and SemanticFPN, with random weights; nothing is downloaded. Prints a table a task and writes <out>.json,
<out>.csv and <out>.png. LinGlo is counted as the paper writes it: mmlinglo/analysis/complexity.py.
"""

import argparse
from pathlib import Path
from typing import List, Optional

from mmlinglo.analysis.figures import plot_comparison
from mmlinglo.analysis.peers import TASKS, backbone_labels, comparison_row
from mmlinglo.analysis.report import format_table, provenance, write_report
from mmlinglo.utils.cli import UsageError, load_config, run

CONFIGS = Path(__file__).parents[2] / 'configs'
COUNTED = dict(
    params_m='params (M)',
    deployed_params_m='deployed (M)',
    macs_g='multiply-adds (G)',
    deployed_macs_g='deployed (G)',
)


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('--task', choices=[*TASKS, 'all'], default='all', help='default: all')
    add('--backbones', nargs='+', metavar='NAME', help='only these, such as LinGlo-b1 PVT-Tiny')
    out = 'work_dirs/analysis/compare_backbones'
    add('--out', default=out, help='path of the files, without suffix; default: %(default)s')
    return parser.parse_args(argv)


def print_table(task: str, rows: List[dict]) -> None:
    print(f'\n{TASKS[task].title}')
    paper = {key: f'paper: {heading}' for key, heading in TASKS[task].columns.items()}
    print(format_table(rows, dict(backbone='backbone', **COUNTED, **paper)))
    for key, reason in (
        ('params_m', 'not counted, provided by neither timm nor mmdet'),
        ('paper_params_m', "not in the paper's table"),
    ):
        names = [row['backbone'] for row in rows if key not in row]
        if names:
            print(f'{", ".join(names)}: {reason}.')


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    tasks = list(TASKS) if args.task == 'all' else [args.task]
    known = list(dict.fromkeys(label for task in tasks for label in backbone_labels(task)))
    wanted = args.backbones or known
    unknown = [label for label in wanted if label not in known]
    if unknown:
        raise UsageError(f'--backbones: no {", ".join(unknown)}; there are {", ".join(known)}')
    rows = []
    for task in tasks:
        cfg = load_config(str(CONFIGS / TASKS[task].config))
        labels = [label for label in backbone_labels(task) if label in wanted]
        rows += [comparison_row(task, cfg, label) for label in labels]
    shapes = {task: TASKS[task].shape for task in tasks}
    write_report(args.out, rows, provenance('cpu', shapes=shapes, batch_size=1))
    plot_comparison(rows, args.out)
    for task in dict.fromkeys(row['task'] for row in rows):
        print_table(task, [row for row in rows if row['task'] == task])
    print(f'\nwritten: {args.out}.json, .csv and .png')
    return 0


if __name__ == '__main__':
    run(main)

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Count LinGlo and the backbones of the paper's tables 2-4 in the same way, beside the paper's numbers.

Each backbone that timm or mmdet provides takes LinGlo's place in this package's classifier, RetinaNet and
SemanticFPN. Weights are random, and nothing is downloaded. The tool prints one table per task, and writes
<out>.json, <out>.csv and <out>.png. It counts LinGlo as the paper defines it: see
mmlinglo/analysis/complexity.py.
"""

from pathlib import Path
from typing import List, Optional

from mmlinglo.analysis.figures import plot_comparison
from mmlinglo.analysis.peers import TASKS, compare_backbone, list_labels
from mmlinglo.analysis.report import format_table, make_parser, provenance, write_report
from mmlinglo.utils.cli import UsageError, load_config, run

CONFIGS = Path(__file__).parents[2] / 'configs'
COLUMNS = ('backbone', 'params_m', 'deployed_params_m', 'macs_g', 'deployed_macs_g')


def print_table(task: str, rows: List[dict]) -> None:
    print(f'\n{TASKS[task].title}')
    print(format_table(rows, (*COLUMNS, *TASKS[task].columns)))
    for key, reason in (
        ('params_m', 'not counted, provided by neither timm nor mmdet'),
        ('paper_params_m', "not in the paper's table"),
    ):
        names = [row['backbone'] for row in rows if key not in row]
        if names:
            print(f'{", ".join(names)}: {reason}.')


def main(argv: Optional[List[str]] = None) -> int:
    parser = make_parser(__doc__, 'compare_backbones')
    add, text = parser.add_argument, 'count only these, such as LinGlo-b1 PVT-Tiny'
    add('--task', choices=[*TASKS, 'all'], default='all', help='default: all')
    add('--backbones', nargs='+', metavar='NAME', help=text)
    args = parser.parse_args(argv)
    tasks = {task: TASKS[task] for task in TASKS if args.task in (task, 'all')}
    known = list(dict.fromkeys(label for task in tasks for label in list_labels(task)))
    unknown = [label for label in args.backbones or () if label not in known]
    if unknown:
        raise UsageError(f'--backbones: no {", ".join(unknown)}; there are {", ".join(known)}')
    rows = []
    for name, task in tasks.items():
        cfg = load_config(str(CONFIGS / task.config))
        labels = [label for label in list_labels(name) if label in (args.backbones or known)]
        rows += [compare_backbone(name, cfg, label) for label in labels]
    shapes = {name: task.shape for name, task in tasks.items()}
    write_report(args.out, rows, provenance('cpu', shapes=shapes, batch_size=1))
    plot_comparison(rows, args.out)
    for name in tasks:
        print_table(name, [row for row in rows if row['task'] == name])
    print(f'\nwritten: {args.out}.json, .csv and .png')
    return 0


if __name__ == '__main__':
    run(main)

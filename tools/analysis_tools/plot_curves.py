# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Draw the accuracy, or any other logged scalar, of one or more trainings (the paper's Fig. 5).

Trainings with the same label, such as several seeds, become one curve: their mean, with a band from the
lowest value to the highest.
"""

import glob
import os
from typing import List, Optional

import pandas as pd
from matplotlib.figure import Figure

from mmlinglo.analysis import report
from mmlinglo.analysis.curves import common_steps, draw_curves, read_scalars
from mmlinglo.utils.cli import UsageError, run


def read_runs(work_dirs: List[str], labels: Optional[List[str]], key: str) -> pd.DataFrame:
    """Read the points of all trainings, with their ``label`` and their ``run``, the work dir."""
    if labels is None:
        names = [os.path.basename(os.path.normpath(pattern)) for pattern in work_dirs]
        labels = names if len(set(names)) == len(names) else work_dirs
    if len(labels) != len(work_dirs):
        raise UsageError(
            f'{len(work_dirs)} work dirs and {len(labels)} labels: give one label for each '
            'work dir, and quote patterns, so that the shell does not expand them'
        )
    runs = []
    for label, pattern in zip(labels, work_dirs):
        found = [pattern] if os.path.isdir(pattern) else sorted(glob.glob(pattern))
        folders = [path for path in found if os.path.isdir(path)]
        if not folders:
            raise UsageError(f'no folder {pattern!r}')
        runs += [read_scalars(path, key).assign(label=label, run=path) for path in folders]
    points = pd.concat(runs, ignore_index=True)
    if points.unit.nunique() > 1:
        units = points.groupby('run').unit.first().to_dict()
        raise UsageError(f'some steps of {key!r} are epochs, others iterations: {units}')
    return points


def main(argv: Optional[List[str]] = None) -> int:
    parser = report.make_parser(__doc__, 'plot_curves')
    add = parser.add_argument
    text = "a quoted pattern, such as 'work_dirs/b0_seed*', means all that match, with one label"
    add('work_dirs', nargs='+', metavar='WORK_DIR', help=f'work dir of a training; {text}')
    text = 'one per WORK_DIR; equal labels make one curve; default: the names of the folders'
    add('--labels', nargs='+', help=text)
    add('--key', default='accuracy/top1', help='name of the scalar; default: %(default)s')
    args = parser.parse_args(argv)
    with report.explain_errors():
        points = read_runs(args.work_dirs, args.labels, args.key)
        common = common_steps(points)
    unit = points.unit[0]
    names = dict(label='label', run='work_dir', step=unit, value=args.key)
    rows = report.list_rows(points.rename(columns=names)[[*names.values()]].astype({unit: int}))
    source = report.provenance('cpu', key=args.key)
    for name in ('device', 'dtype', 'threads'):
        del source[name]  # this process's; the trainings' are in their own logs
    report.write_report(args.out, rows, source)
    figure = Figure(figsize=(7, 4.5), layout='constrained')
    draw_curves(figure.subplots(), points, unit.title(), args.key)
    report.save_figure(figure, args.out)
    last = common[common.step == common.groupby('label').step.transform('max')]
    numbers = {name: ('value', name) for name in ('mean', 'min', 'max')}
    by_label = last.groupby('label', sort=False)
    table = by_label.agg(runs=('run', 'nunique'), step=('step', 'max'), **numbers).reset_index()
    headings = dict(label='Label', runs='Runs', step=f'Last {unit}', mean=args.key)
    headings.update(min='Minimum', max='Maximum')
    print(report.format_table(table.to_dict('records'), headings))
    print(f'{args.out}.json, .csv, .png')
    return 0


if __name__ == '__main__':
    run(main)

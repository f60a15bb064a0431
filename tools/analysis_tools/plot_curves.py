# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Draw accuracy, or any other logged scalar, of any number of trainings (the paper's Fig. 5).

Several trainings of one label, such as seeds, become one curve: their mean, with a band
from the lowest to the highest.
"""

import argparse
import glob
import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Dict, List, Optional

import torch

from mmlinglo.analysis.curves import plot_curves, read_scalars, step_unit, summarize
from mmlinglo.analysis.report import format_table, provenance, write_report
from mmlinglo.utils.cli import UsageError, run


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'work_dirs',
        nargs='+',
        metavar='WORK_DIR',
        help="work dir of a training; a quoted pattern, such as 'work_dirs/b0_seed*', stands for "
        'all that match, as trainings of one label',
    )
    parser.add_argument(
        '--labels',
        nargs='+',
        help='one for each WORK_DIR; equal ones belong together; default: the names of the folders',
    )
    parser.add_argument('--key', default='accuracy/top1', help='name of the scalar')
    parser.add_argument(
        '--out', default='work_dirs/analysis/plot_curves', help='path of the files, without suffix'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    folders = labelled_folders(args.work_dirs, args.labels)
    try:
        curves = {
            label: [read_scalars(folder, args.key) for folder in group]
            for label, group in folders.items()
        }
        units = {
            str(folder): step_unit(folder, args.key)
            for group in folders.values()
            for folder in group
        }
        table = [summary_row(label, runs) for label, runs in curves.items()]
    except ValueError as error:
        raise UsageError(str(error)) from error
    unit, *others = set(units.values())
    if others:
        raise UsageError(f'some steps of {args.key!r} are epochs, others iterations: {units}')

    rows = [
        # JSON has no NaN: the loss of a diverged training becomes an empty cell.
        {
            'label': label,
            'work_dir': str(folder),
            unit: int(step),
            args.key: value if math.isfinite(value) else None,
        }
        for label, group in folders.items()
        for folder, points in zip(group, curves[label])
        for step, value in points
    ]
    source = provenance('cpu', torch.float32, key=args.key)
    for name in ('device', 'dtype', 'threads'):
        del source[name]  # this process's; the trainings' are in their own logs
    write_report(args.out, rows, source)
    plot_curves(curves, unit, args.key, Path(args.out))
    headings = dict(label='Label', runs='Runs', step=f'Last {unit}', mean=args.key)
    print(format_table(table, {**headings, 'minimum': 'Minimum', 'maximum': 'Maximum'}))
    print(f'{args.out}.json, .csv, .png')


def labelled_folders(work_dirs: List[str], labels: Optional[List[str]]) -> Dict[str, List[Path]]:
    """Folders of each label, in the order of the command line."""
    if labels is None:
        names = [Path(pattern).name for pattern in work_dirs]
        labels = names if len(set(names)) == len(names) else work_dirs
    if len(labels) != len(work_dirs):
        raise UsageError(
            f'{len(work_dirs)} work dirs and {len(labels)} labels: give one label for each '
            'work dir, and quote patterns, lest the shell replace them by several names'
        )
    folders = defaultdict(list)
    for label, pattern in zip(labels, work_dirs):
        found = (
            [pattern]
            if os.path.isdir(pattern)
            else sorted(filter(os.path.isdir, glob.glob(pattern)))
        )
        if not found:
            raise UsageError(f'no folder {pattern!r}')
        folders[label] += map(Path, found)
    return folders


def summary_row(label: str, runs: List[list]) -> dict:
    """The last point of a curve, as a line of the table."""
    try:
        last = summarize(runs)[-1]._asdict()
    except ValueError as error:
        raise UsageError(f'{label!r}: {error}') from error
    return dict(last, label=label, runs=len(runs), step=int(last['step']))


if __name__ == '__main__':
    run(main)

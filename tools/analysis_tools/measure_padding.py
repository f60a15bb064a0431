# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""How far the padding of a batch moves an image's features, and what LinGlo's mask_padding costs.

Untrained backbones of several seeds see a random image alone and with zeros on its right, as a
wider image in the same batch would force on it. The cost is measured on a batch of two images of
COCO's size, the second of them padded.
"""

import argparse
from typing import List, Optional

import torch

from mmlinglo.analysis.padding import LABELS, measure_cost, measure_shifts
from mmlinglo.analysis.report import format_table, provenance, write_report
from mmlinglo.utils.cli import UsageError, run

SIZES = [(800, 1333), (800, 1066)]


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    text = 'in pixels, on an image of 320 x 320; default: %(default)s'
    add('--paddings', nargs='+', type=int, default=[128, 320], help=text)
    add('--seeds', type=int, default=5, help='how many; default: %(default)s')
    add('--rounds', type=int, default=5, help='of timing; default: %(default)s')
    add('--threads', type=int, help="CPU threads; default: PyTorch's")
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    add('--device', choices=['cpu', 'cuda'], default=device, help='of the timing')
    out = 'work_dirs/analysis/measure_padding'
    add('--out', default=out, help='path of the files, without suffix; default: %(default)s')
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    for name in ('seeds', 'threads'):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f'--{name} must be at least 1, got {value}')
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        shifts = list(measure_shifts(args.paddings, seeds=range(args.seeds)))
        costs = measure_cost(SIZES, args.device, args.rounds)
    except ValueError as error:
        raise UsageError(str(error)) from error
    source = provenance(args.device, seeds=args.seeds, rounds=args.rounds)
    write_report(args.out, [*shifts, *costs], source)
    for row in shifts:
        row['backbone'] = LABELS[row['backbone']]
    columns = dict(
        backbone='Backbone',
        padding='Padding [pixels]',
        shift='Features move by [%]',
        shift_min='least',
        shift_max='most',
    )
    print(format_table(shifts, columns), end='\n\n')
    columns = dict(
        work='LinGlo-b0, 800 x 1333 and 800 x 1066 in a batch',
        plain_ms='plain [ms]',
        masked_ms='mask_padding [ms]',
        ratio='ratio',
    )
    print(format_table(costs, columns))
    print(f'\n{args.out}.json, .csv')
    return 0


if __name__ == '__main__':
    run(main)

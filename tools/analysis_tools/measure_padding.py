# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Measure how far the padding of a batch moves an image's features, and what LinGlo's mask_padding costs.

Untrained backbones with several seeds see a random image alone, and with zeros on its right, as in a
batch with a wider image. The tool measures the cost on a batch of two images of COCO's size, the second
of which is padded.
"""

from typing import List, Optional

import torch

from mmlinglo.analysis import report
from mmlinglo.analysis.padding import measure_cost, measure_shifts
from mmlinglo.analysis.peers import ALL
from mmlinglo.utils.cli import run

SIZES = [(800, 1333), (800, 1066)]


def main(argv: Optional[List[str]] = None) -> int:
    parser = report.make_parser(__doc__, 'measure_padding', rounds=5)
    add, text = (
        parser.add_argument,
        'widths in pixels, for an image of 320 x 320; default: %(default)s',
    )
    add('--paddings', nargs='+', type=int, default=[128, 320], help=text)
    add('--seeds', type=report.at_least(1), default=5, help='number of seeds; default: %(default)s')
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    with report.explain_errors():
        shifts = measure_shifts(args.paddings, seeds=range(args.seeds))
        costs = measure_cost(SIZES, args.device, args.rounds)
    source = report.provenance(args.device, seeds=args.seeds, rounds=args.rounds)
    report.write_report(args.out, [*shifts, *costs], source)
    print('How far features move in percent, by pixels of padding\n')
    shifts = [dict(row, backbone=ALL[row['backbone']].label) for row in shifts]
    print(report.format_table(shifts, ('backbone', 'padding', 'shift', 'shift_min', 'shift_max')))
    print('\nLinGlo-b0, 800 x 1333 and 800 x 1066 in a batch, without and with mask_padding\n')
    print(report.format_table(costs, ('work', 'plain_ms', 'masked_ms', 'ratio')))
    print(f'\n{args.out}.json, .csv')
    return 0


if __name__ == '__main__':
    run(main)

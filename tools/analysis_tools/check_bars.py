# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Check the project's performance bars (float32, eager, CPU): benchmark_backbones.py --bars.

Each bar is a ratio of two measurements of the same run, see mmlinglo/analysis/bars.py. The numbers hold
only for the machine that they were measured on.
"""

import sys
from typing import List, Optional

import torch

from mmlinglo.analysis import bars, report
from mmlinglo.utils.cli import run


def main(argv: Optional[List[str]] = None) -> int:
    parser = report.make_parser(__doc__, 'benchmark_backbones', rounds=7, device=False)
    parser.set_defaults(threads=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = []
    with report.explain_errors():
        for row in bars.measure_bars(args.rounds):
            rows.append(row)
            print(f'{row["what"]}, {row["shape"]}: {row["ratio"]:.3g}', file=sys.stderr)
    source = report.provenance('cpu', rounds=args.rounds)
    report.write_report(args.out, rows, source)
    print(f'{source["device"]}, {args.threads} threads, float32, eager, {args.rounds} rounds\n')
    print(report.format_table(rows, bars.COLUMNS), f'{args.out}.json, .csv', sep='\n')
    return 0


if __name__ == '__main__':
    run(main)

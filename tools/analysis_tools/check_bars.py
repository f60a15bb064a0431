# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Check the project's performance bars (float32, eager, CPU): benchmark_backbones.py --bars.

Each is a ratio of two measurements of this run, see mmlinglo/analysis/bars.py. Figures hold for the
machine that they were measured on.
"""

import argparse
import sys
from typing import List, Optional

from mmlinglo.analysis import bars
from mmlinglo.analysis.report import format_table, provenance, write_report
from mmlinglo.utils.cli import UsageError, run


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('--threads', type=int, default=2, help='CPU threads; default: %(default)s')
    add('--rounds', type=int, default=7, help='rounds of timing; default: %(default)s')
    out = 'work_dirs/analysis/benchmark_backbones'
    add('--out', default=out, help='path of the files, without suffix; default: %(default)s')
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    rows = []
    try:
        for bar in bars.measure_bars(args.threads, args.rounds):
            rows.append(bar.row())
            print(f'{bar.what}, {bar.shape}: {rows[-1]["ratio"]:.3g}', file=sys.stderr)
    except (ValueError, ModuleNotFoundError) as error:
        raise UsageError(f'{error}') from error
    source = provenance('cpu', rounds=args.rounds)
    write_report(args.out, rows, source)
    print(f'{source["device"]}, {args.threads} threads, float32, eager, {args.rounds} rounds\n')
    print(format_table(rows, bars.COLUMNS), f'{args.out}.json, .csv', sep='\n')
    return 0


if __name__ == '__main__':
    run(main)

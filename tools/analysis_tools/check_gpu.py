# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Check LinGlo on this GPU: are its results right, and which of its forms is faster? A step of tools/gpu_day.sh.

checks: compare every variant with float64 on the CPU. forms: time training steps of LinGlo in each form,
and of PVTv2. recipes: time training steps of RetinaNet and SemanticFPN, and measure their peak memory.
"""

import argparse
from pathlib import Path
from typing import List, Optional

import torch

from mmlinglo.analysis import gpu_checks
from mmlinglo.analysis.report import format_table, provenance, write_report
from mmlinglo.utils.cli import UsageError, checked_device, run

ROOT = Path(__file__).resolve().parents[2]
TINY = dict(
    embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4), mlp_ratio=(2, 2, 2, 2)
)
MODELS = [f'{family}_b{size}' for size in range(3) for family in ('linglo', 'pvt_v2')]
IMAGES = [(2, 800, 1344), (16, 224, 224), (128, 224, 224), (4, 512, 512)]


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('what', choices=['checks', 'forms', 'recipes'])
    add('--device', help='default: the first GPU, else the CPU')
    add('--rehearse', action='store_true', help='run at toy size')
    add('--rounds', type=int, default=10, help='rounds of timing; default: %(default)s')
    out = 'work_dirs/analysis/check_gpu'
    add('--out', default=out, help='path of the files, without suffix; default: %(default)s')
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    device = checked_device(args.device)
    torch.manual_seed(0)
    if args.what == 'checks':
        arch, size = (TINY, 64) if args.rehearse else ('b0', 224)
        found, columns = gpu_checks.check_all(device, arch, size), gpu_checks.CHECK_COLUMNS
    elif args.what == 'forms':
        models, images = (MODELS[:2], [(2, 64, 64)]) if args.rehearse else (MODELS, IMAGES)
        found = gpu_checks.measure_forms(device, models, images, args.rounds)
        columns = gpu_checks.FORM_COLUMNS
    else:
        found = gpu_checks.measure_recipes(device, ROOT, args.rehearse, args.rounds)
        columns = gpu_checks.RECIPE_COLUMNS
    rows = []
    for row in found:  # written after each row, because the step may run out of time
        rows.append(row)
        write_report(
            args.out, rows, provenance(device, rounds=args.rounds, rehearsal=args.rehearse)
        )
    missed = [row for row in rows if row.get('verdict') == 'missed']
    print(format_table(missed + [row for row in rows if row not in missed], columns))
    if missed:
        raise UsageError(f'{len(missed)} of {len(rows)} checks missed: {args.out}.csv')
    return 0


if __name__ == '__main__':
    run(main)

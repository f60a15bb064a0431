# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Check LinGlo on this GPU: are its results right, and which of its forms is faster? A step of tools/gpu_day.sh.

checks: compare every variant with float64 on the CPU. forms: time training steps of LinGlo in each form,
and of PVTv2. recipes: time training steps of RetinaNet and SemanticFPN, and measure their peak memory.
"""

from pathlib import Path
from typing import List, Optional

import torch

from mmlinglo.analysis import gpu_checks
from mmlinglo.analysis.report import (
    at_least,
    format_table,
    make_parser,
    provenance,
    write_report,
)
from mmlinglo.utils.cli import UsageError, checked_device, run

ROOT = Path(__file__).resolve().parents[2]
TINY = dict(
    embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4), mlp_ratio=(2, 2, 2, 2)
)
MODELS = [f'{family}_b{size}' for size in range(3) for family in ('linglo', 'pvt_v2')]
IMAGES = [(2, 800, 1344), (16, 224, 224), (128, 224, 224), (4, 512, 512)]


def main(argv: Optional[List[str]] = None) -> int:
    parser = make_parser(__doc__, 'check_gpu')
    add = parser.add_argument
    add('what', choices=['checks', 'forms', 'recipes'])
    add('--device', help='default: the first GPU, else the CPU')
    add('--rehearse', action='store_true', help='run at toy size')
    text = 'rounds of timing; default: %(default)s'
    add('--rounds', type=at_least(2), default=10, help=text)
    args = parser.parse_args(argv)
    device = checked_device(args.device)
    torch.manual_seed(0)
    if args.what == 'checks':
        arch, size = (TINY, 64) if args.rehearse else ('b0', 224)
        found = gpu_checks.check_all(device, arch, size)
    elif args.what == 'forms':
        models, images = (MODELS[:2], [(2, 64, 64)]) if args.rehearse else (MODELS, IMAGES)
        found = gpu_checks.measure_forms(device, models, images, args.rounds)
    else:
        found = gpu_checks.measure_recipes(device, ROOT, args.rehearse, args.rounds)
    rows = []
    for row in found:  # written after each row, because the step may run out of time
        rows.append(row)
        source = provenance(device, rounds=args.rounds, rehearsal=args.rehearse)
        write_report(args.out, rows, source)
    rows.sort(key=lambda row: row.get('verdict') != 'missed')
    print(format_table(rows, list(rows[0])))
    missed = sum(row.get('verdict') == 'missed' for row in rows)
    if missed:
        raise UsageError(f'{missed} of {len(rows)} checks missed: {args.out}.csv')
    return 0


if __name__ == '__main__':
    run(main)

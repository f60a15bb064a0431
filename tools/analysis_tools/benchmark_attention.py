# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Latency and peak memory of LinGlo with key-only and with dot-product attention by input size.

The paper's Fig. 4 (there LinGlo-b0, batch 16, on a 32 GB V100: --memory-limit 32 on a larger
GPU). PyTorch's dot-product attention runs in a fused kernel that never has the N x N matrix of
all pairs in memory; a third curve is the same attention with the matrix, as in 2022.
"""

import argparse
import sys
from pathlib import Path

import torch

from mmlinglo import LinGlo
from mmlinglo.analysis.attention_scaling import (
    ATTENTIONS,
    Setting,
    measure_size,
    plot_scaling,
)
from mmlinglo.analysis.report import format_table, provenance, write_report
from mmlinglo.utils.cli import UsageError, run

DTYPES = {name: getattr(torch, name) for name in ('float32', 'float16', 'bfloat16')}
# Device type: batch size and input sizes that take a few minutes.
DEFAULTS = {
    'cuda': (16, (224, 320, 416, 512, 608, 704, 800)),
    'cpu': (1, (128, 192, 256, 320, 384, 448, 512)),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--arch', choices=list(LinGlo.arch_zoo), default='b0')
    parser.add_argument(
        '--attentions', nargs='+', choices=list(ATTENTIONS), default=list(ATTENTIONS)
    )
    parser.add_argument(
        '--sizes', nargs='+', type=int, help='input sizes in pixels; default: 128-512, GPU 224-800'
    )
    parser.add_argument('--batch-size', type=int, help='default: 1 on a CPU, 16 on a GPU')
    parser.add_argument(
        '--device', choices=list(DEFAULTS), default='cuda' if torch.cuda.is_available() else 'cpu'
    )
    parser.add_argument('--dtype', choices=list(DTYPES), default='float32')
    parser.add_argument('--threads', type=int, help="CPU threads; default: PyTorch's")
    parser.add_argument(
        '--train-step',
        action='store_true',
        help='forward and backward of the training form instead of the forward of the deployed one',
    )
    parser.add_argument('--rounds', type=int, default=5, help='rounds of timing, at least 2')
    parser.add_argument(
        '--memory-limit',
        type=float,
        metavar='GIB',
        help='memory that one measurement may take; beyond it, it counts as out of memory',
    )
    parser.add_argument(
        '--out',
        default='work_dirs/analysis/benchmark_attention',
        help='path of the files, without suffix',
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    batch_size, sizes = DEFAULTS[args.device]
    rows = []
    try:
        setting = Setting(
            arch=args.arch,
            batch_size=batch_size if args.batch_size is None else args.batch_size,
            device=args.device,
            dtype=DTYPES[args.dtype],
            threads=torch.get_num_threads() if args.threads is None else args.threads,
            train_step=args.train_step,
        )
        for size in sorted(set(args.sizes or sizes)):
            print(f'measuring {size} pixels', file=sys.stderr)
            rows += measure_size(size, setting, args.attentions, args.rounds, args.memory_limit)
    except ValueError as error:
        raise UsageError(str(error)) from error

    torch.set_num_threads(setting.threads)  # what the provenance states
    work = 'training step' if args.train_step else 'inference'
    source = provenance(
        args.device,
        setting.dtype,
        arch=args.arch,
        batch_size=setting.batch_size,
        work=work,
        rounds=args.rounds,
        memory_limit_gib=args.memory_limit,
    )
    write_report(args.out, rows, source)
    place = source['device']
    if args.device == 'cpu':
        place += f', {setting.threads} thread{"s" * (setting.threads > 1)}'
    if args.memory_limit is not None:
        place += f', limited to {args.memory_limit:g} GiB'
    title = f'LinGlo-{args.arch}, {work}, batch of {setting.batch_size}, {args.dtype}\n{place}'
    plot_scaling(rows, title, Path(args.out))
    columns = dict(
        size='Pixels',
        attention='Attention',
        latency_ms='Latency [ms a batch]',
        peak_memory_mib='Peak memory [MiB]',
        status='Status',
    )
    print(title.replace('\n', '; '), end='\n\n')
    print(
        format_table([{**row, 'attention': ATTENTIONS[row['attention']]} for row in rows], columns)
    )
    print(f'{args.out}.json, .csv, .png')


if __name__ == '__main__':
    run(main)

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Measure LinGlo against other backbones: latency, throughput, memory, size, published accuracy.

Weights are random, and nothing is downloaded. The tool measures each backbone in its training form and, if
it can be fused for inference, in its fused form too. --sweep and --sizes measure at growing image sizes.
--bars checks the project's performance bars, and takes the options of check_bars.py. The numbers hold
only for the machine that they were measured on.
"""

import argparse
import sys
from typing import List, Optional

import torch
from check_bars import main as check_bars

from mmlinglo.analysis import benchmark, report
from mmlinglo.analysis.complexity import pad
from mmlinglo.analysis.figures import plot_accuracy, plot_sweep
from mmlinglo.analysis.peers import ALL, PEERS
from mmlinglo.utils.cli import UsageError, run

COMPARED = [name for name, peer in PEERS.items() if peer.has_maps]
SWEPT = ['linglo_b0', 'linglo_b0_dot_product', 'pvt_v2_b0', 'swiftformer_xs']
SIZES = [224, 320, 448, 640, 896, 1280, 2048]


def make_parser(description: str, name: str) -> argparse.ArgumentParser:
    parser = report.make_parser(description, name, rounds=10)
    add = parser.add_argument
    add('--models', nargs='+', metavar='NAME', choices=ALL, help=f'models, among {", ".join(ALL)}')
    add('--mode', choices=['inference', 'train'], default='inference', help='default: inference')
    add('--forms', nargs='+', choices=benchmark.FORMS, help='default: both')
    add('--compile', action='store_true', help='measure torch.compile too')
    text = 'autocast: float32 with autocast to bfloat16'
    add('--dtype', choices=benchmark.DTYPES, default='float32', help=text)
    add('--batch-size', type=report.at_least(1), help='default: 1')
    add = parser.add_mutually_exclusive_group().add_argument
    text = 'image size, padded to a multiple of 32; default: 224 224, for pooled features'
    add('--shape', nargs=2, type=int, metavar=('H', 'W'), help=text)
    text = 'measure at these sizes in pixels, one after another'
    add('--sizes', nargs='+', type=int, help=text)
    text = f'the same as --sizes {" ".join(map(str, SIZES))}'
    add('--sweep', dest='sizes', action='store_const', const=SIZES, help=text)
    add = parser.add_argument
    add('--no-memory', action='store_true', help='do not measure memory')
    text = 'stop a model whose first call takes longer; default: 20 with several sizes'
    add('--max-seconds', type=report.at_least(0.001, float), help=text)
    return parser


def measure(args: argparse.Namespace) -> None:
    """Compare at one size, or sweep over sizes. Write the rows and their figure."""
    if args.no_memory and args.max_seconds:
        raise UsageError('--max-seconds cannot be used with --no-memory')
    usual = ['fused'] if args.sizes else benchmark.FORMS
    forms = args.forms or (['trained'] if args.mode == 'train' else usual)
    models = args.models or (SWEPT if args.sizes else COMPARED)
    shapes = [(size, size) for size in args.sizes or ()]
    shapes = shapes or [pad(args.shape or (224, 224))]
    maps, batch_size = bool(args.sizes) or shapes != [(224, 224)], args.batch_size or 1
    common = dict(batch_size=batch_size, maps=maps, train_step=args.mode == 'train')
    common.update(device=args.device, dtype=args.dtype)
    settings = benchmark.list_settings(models, forms, args.compile, **common)
    how = dict(rounds=args.rounds, max_seconds=args.max_seconds or (20.0 if args.sizes else None))
    torch.set_num_threads(args.threads)
    rows = []
    for row in benchmark.measure_backbones(settings, shapes, memory=not args.no_memory, **how):
        rows.append(row)
        print(f'{row["model"]}, {row["width"]} pixels: {row["status"]}', file=sys.stderr)
    reference = 'pvt_v2_b0' if 'pvt_v2_b0' in models else models[0]
    benchmark.add_ratios(rows, reference)
    how.update(mode=args.mode, reference=reference, batch_size=batch_size)
    if args.dtype != 'autocast':
        how.update(dtype=args.dtype)
    source = report.provenance(args.device, autocast=args.dtype == 'autocast', **how)
    report.write_report(args.out, rows, source)
    size = '' if args.sizes else ' of {} x {} Pixels'.format(*shapes[0])
    outputs = 'Four Feature Maps' if maps else 'Pooled Features'
    task = 'Training Step' if args.mode == 'train' else 'Inference'
    heading = f'{task}, Batch of {batch_size}{size}, {outputs}'
    place = f'{args.dtype}; {source["device"]}, CPU Threads: {args.threads}'
    (plot_sweep if args.sizes else plot_accuracy)(rows, f'{heading}\n{place}', args.out)
    print(f'{heading}, {place}\n\n{report.format_table(rows, benchmark.COLUMNS)}')
    print(f'{args.out}.json, .csv, .png')


def main(argv: Optional[List[str]] = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if '--bars' in argv:
        return check_bars([arg for arg in argv if arg != '--bars'])
    parser = make_parser(__doc__, 'benchmark_backbones')
    parser.add_argument('--bars', action='store_true', help="check the project's performance bars")
    with report.explain_errors():
        measure(parser.parse_args(argv))
    return 0


if __name__ == '__main__':
    run(main)

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Measure LinGlo against other backbones: latency, throughput, memory, size, published accuracy.

Weights are random, and nothing is downloaded. The tool measures each backbone in its training form and, if
it can be fused for inference, in its fused form too. --sweep measures at growing image sizes instead. --bars
checks the project's performance bars, and takes the options of check_bars.py. The numbers hold only for the
machine that they were measured on.
"""

import argparse
import sys
from typing import List, Optional

from check_bars import main as check_bars

from mmlinglo.analysis import benchmark, report
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
    text = 'image size, padded to a multiple of 32; default: 224 224, for pooled features'
    add('--shape', nargs=2, type=int, metavar=('H', 'W'), help=text)
    add('--sweep', action='store_true', help='measure at growing image sizes, see --sizes')
    add('--sizes', nargs='+', type=int, help='those of --sweep, in pixels; default: 224 to 2048')
    add('--no-memory', action='store_true', help='do not measure memory')
    text = 'most memory that one model may take'
    add('--memory-limit', type=report.at_least(0.001, float), metavar='GIB', help=text)
    text = 'stop a model whose first call takes longer; default: 20 with --sweep'
    add('--max-seconds', type=report.at_least(0.001, float), help=text)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Refuse options that would have no effect, and set the defaults that depend on others."""
    if args.sweep and (args.forms or args.compile or args.shape or args.no_memory):
        raise UsageError('--forms, --compile, --shape and --no-memory cannot be used with --sweep')
    if args.sizes and not args.sweep:
        raise UsageError('--sizes needs --sweep')
    if args.no_memory and (args.memory_limit or args.max_seconds):
        raise UsageError('--memory-limit and --max-seconds cannot be used with --no-memory')
    args.models = args.models or (SWEPT if args.sweep else COMPARED)
    args.batch_size = args.batch_size or 1
    args.max_seconds = args.max_seconds or (20.0 if args.sweep else None)
    if args.forms is None:
        usual = ['fused'] if args.sweep else benchmark.FORMS
        args.forms = ['trained'] if args.mode == 'train' else usual


def measure(args: argparse.Namespace) -> None:
    """Compare at one size, or sweep over sizes. Write the rows and their figure."""
    check_args(args)
    shapes = [benchmark.pad(args.shape or (224, 224))]
    if args.sweep:
        shapes = [(size, size) for size in args.sizes or SIZES]
    maps = args.sweep or shapes != [(224, 224)]
    common = dict(batch_size=args.batch_size, maps=maps, train_step=args.mode == 'train')
    common.update(device=args.device, dtype=args.dtype)
    settings = benchmark.list_settings(args.models, args.forms, args.compile, **common)
    how = dict(rounds=args.rounds, memory_limit=args.memory_limit, max_seconds=args.max_seconds)
    how.update(threads=args.threads)
    rows = []
    for row in benchmark.measure_backbones(settings, shapes, memory=not args.no_memory, **how):
        rows.append(row)
        print(f'{row["model"]}, {row["width"]} pixels: {row["status"]}', file=sys.stderr)
    reference = 'pvt_v2_b0' if 'pvt_v2_b0' in args.models else args.models[0]
    benchmark.add_ratios(rows, reference)
    how.update(mode=args.mode, reference=reference, batch_size=args.batch_size)
    if args.dtype != 'autocast':
        how.update(dtype=args.dtype)
    source = report.provenance(args.device, autocast=args.dtype == 'autocast', **how)
    report.write_report(args.out, rows, source)
    size = '' if args.sweep else ' of {} x {} Pixels'.format(*shapes[0])
    outputs = 'Four Feature Maps' if maps else 'Pooled Features'
    task = 'Training Step' if args.mode == 'train' else 'Inference'
    heading = f'{task}, Batch of {args.batch_size}{size}, {outputs}'
    place = f'{args.dtype}; {source["device"]}, CPU Threads: {args.threads}'
    (plot_sweep if args.sweep else plot_accuracy)(rows, f'{heading}\n{place}', args.out)
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

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Measure LinGlo against other backbones: latency, throughput, memory, size, published accuracy.

Weights are random; nothing is downloaded. Each backbone is measured as it was trained and, if it can be
fused for inference, in that form too. --sweep grows the images instead. --bars checks the project's bars,
with the options of check_bars.py. Figures hold for the machine that they were measured on.
"""

import argparse
import sys
from typing import List, Optional

import torch
from check_bars import main as check_bars

from mmlinglo.analysis import benchmark
from mmlinglo.analysis.figures import plot_accuracy, plot_sweep
from mmlinglo.analysis.memory import ProcessDiedError
from mmlinglo.analysis.peers import ALL, PEERS
from mmlinglo.analysis.report import format_table, provenance, write_report
from mmlinglo.utils.cli import UsageError, run

SWEPT = ['linglo_b0', 'linglo_b0_dot_product', 'pvt_v2_b0', 'swiftformer_xs']
DTYPES = ['float32', 'float16', 'bfloat16', 'autocast']
# Options that only one of the two ways of measuring takes, and their defaults.
COMPARE = dict(forms=list(benchmark.FORMS), compile=False, shape=(224, 224), no_memory=False)
SWEEP = dict(sizes=[224, 320, 448, 640, 896, 1280, 2048], max_seconds=20.0)


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add, none = parser.add_argument, argparse.SUPPRESS
    add('--sweep', action='store_true', help='grow the images, see --sizes')
    add('--bars', action='store_true', help="check the project's performance bars")
    add('--models', nargs='+', metavar='NAME', help=f'of {", ".join(ALL)}')
    add('--reference', help='model of the ratio; default: pvt_v2_b0, or the first')
    add('--mode', choices=['inference', 'train'], default='inference', help='default: inference')
    add('--batch-size', type=int, default=1, help='default: 1')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    add('--device', choices=['cpu', 'cuda'], default=device, help='default: %(default)s')
    add('--dtype', choices=DTYPES, default='float32', help='autocast: of float32, to bfloat16')
    add('--channels-last', action='store_true')
    add('--threads', type=int, help="CPU threads; default: PyTorch's, 2 for --bars")
    add('--rounds', type=int, help='of timing; default: 10, 7 for --bars, 5 for --sweep')
    add('--memory-limit', type=float, metavar='GIB', help='memory that one model may take')
    out = 'work_dirs/analysis/benchmark_backbones'
    add('--out', default=out, help='path of the files, without suffix; default: %(default)s')
    only = parser.add_argument_group('without --sweep').add_argument
    only('--forms', nargs='+', choices=benchmark.FORMS, default=none, help='default: both')
    only('--compile', action='store_true', default=none, help='torch.compile beside eager')
    text = 'of the images, padded to a multiple of 32; default: 224 224, for pooled features'
    only('--shape', nargs=2, type=int, metavar=('H', 'W'), default=none, help=text)
    only('--no-memory', action='store_true', default=none, help='measure no memory')
    only = parser.add_argument_group('with --sweep').add_argument
    only('--sizes', nargs='+', type=int, default=none, help='in pixels; default: 224 to 2048')
    only('--max-seconds', type=float, default=none, help='slower models stop there; default: 20')
    args = parser.parse_args(argv)
    for name in [name for name in (COMPARE if args.sweep else SWEEP) if name in args]:
        how = 'goes without' if args.sweep else 'needs'
        parser.error(f'--{name.replace("_", "-")} {how} --sweep')
    defaults = dict(SWEEP, models=SWEPT, rounds=5)
    if not args.sweep:
        defaults = dict(COMPARE, models=[m for m in PEERS if PEERS[m].has_maps], rounds=10)
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**{**vars(args), **defaults, **given})


def measure(args: argparse.Namespace) -> None:
    """Compare at one size, or sweep; write the rows and their figure."""
    train_step, autocast = args.mode == 'train', args.dtype == 'autocast'
    dtype = torch.float32 if autocast else getattr(torch, args.dtype)
    setting = benchmark.Setting(args.batch_size, args.device, dtype, args.threads, train_step)
    shape = setting.shape if args.sweep else benchmark.padded(args.shape)
    maps = args.sweep or shape != (224, 224)
    more = dict(autocast=autocast, channels_last=args.channels_last)
    setting = benchmark.replace(setting, shape=shape, maps=maps, **more)
    reference = args.reference or ('pvt_v2_b0' if 'pvt_v2_b0' in args.models else args.models[0])
    if reference not in args.models:
        raise UsageError(f'the reference {reference!r} must be among the models that are measured')
    limits, rows = (args.memory_limit, args.max_seconds if args.sweep else None), []
    if args.sweep:
        for row in benchmark.sweep(args.models, args.sizes, setting, args.rounds, *limits):
            rows.append(row)
            print(f'{row["model"]}, {row["width"]} pixels: {row["status"]}', file=sys.stderr)
    else:
        forms = ['trained'] if train_step else args.forms
        variants = benchmark.variants_of(args.models, forms, args.compile)
        memory = not args.no_memory
        rows = benchmark.measure_backbones(variants, setting, args.rounds, memory, *limits)
    benchmark.add_ratios(rows, reference)
    torch.set_num_threads(args.threads or torch.get_num_threads())  # what the provenance states
    stated = dict(mode=args.mode, reference=reference, batch_size=args.batch_size, **more)
    stated.update(rounds=args.rounds, memory_limit=limits[0], max_seconds=limits[1])
    source = provenance(args.device, dtype, **stated)
    write_report(args.out, rows, source)
    size = '' if args.sweep else ' of {} x {} pixels'.format(*shape)
    outputs = 'four feature maps' if maps else 'pooled features'
    outputs += ', channels-last' * args.channels_last
    heading = f'{args.mode.capitalize()}, batch of {args.batch_size}{size}, {outputs}'
    place = f'{args.dtype}; {source["device"]}, CPU threads: {source["threads"]}'
    (plot_sweep if args.sweep else plot_accuracy)(rows, f'{heading}\n{place}', args.out)
    print(f'{heading}, {place}\n\n{format_table(rows, benchmark.COLUMNS)}')
    print(f'{args.out}.json, .csv, .png')


def main(argv: Optional[List[str]] = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if '--bars' in argv:
        return check_bars([arg for arg in argv if arg != '--bars'])
    try:
        measure(parse_args(argv))
    except ProcessDiedError as error:
        raise UsageError(f'PyTorch crashed ({error}): leave models out by --models') from error
    except (ValueError, ModuleNotFoundError) as error:
        raise UsageError(f'{error}') from error
    return 0


if __name__ == '__main__':
    run(main)

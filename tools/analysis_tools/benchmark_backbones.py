# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Measure LinGlo against timm's backbones: latency, throughput, memory, size, published accuracy.

Random weights, nothing is downloaded. Each backbone is measured as it was trained and, if it has
batch norms or branches to fuse, in its form for inference too. --sweep grows the images instead,
--bars checks the project's performance bars (float32, eager, CPU; takes --threads, --rounds and
--out alone). Figures hold for the machine that they were measured on.
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import List

import torch

from mmlinglo.analysis import bars
from mmlinglo.analysis.backbones import BACKBONES
from mmlinglo.analysis.benchmark import (
    COLUMNS,
    FORMS,
    Setting,
    add_ratios,
    measure_backbones,
    padded,
    sweep,
    variants_of,
)
from mmlinglo.analysis.benchmark_figures import plot_accuracy, plot_sweep
from mmlinglo.analysis.execution import Execution
from mmlinglo.analysis.memory import ProcessDiedError
from mmlinglo.analysis.report import format_table, provenance, write_report
from mmlinglo.utils.cli import UsageError, run

SWEPT = ('linglo_b0', 'linglo_b0_dot_product', 'pvt_v2_b0', 'swiftformer_xs')
COMPARED = tuple(name for name in BACKBONES if name != 'linglo_b0_dot_product')
STATED = (
    'mode',
    'reference',
    'batch_size',
    'channels_last',
    'rounds',
    'memory_limit',
    'max_seconds',
)
SIZES = (224, 320, 448, 640, 896, 1280, 2048)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument('--sweep', action='store_true', help='grow the images, see --sizes')
    what.add_argument('--bars', action='store_true', help="check the project's performance bars")
    parser.add_argument(
        '--models', nargs='+', metavar='NAME', help=f'of {", ".join(BACKBONES)}; default: all'
    )
    parser.add_argument(
        '--forms', nargs='+', choices=FORMS, default=FORMS, help='fused: for inference only'
    )
    parser.add_argument('--reference', help='model of the ratio; default: pvt_v2_b0, or the first')
    parser.add_argument('--mode', choices=['inference', 'train'], default='inference')
    parser.add_argument('--compile', action='store_true', help='torch.compile beside eager')
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        default=(224, 224),
        metavar=('H', 'W'),
        help='size of the images, padded to a multiple of 32; four feature maps unless 224 224',
    )
    parser.add_argument('--sizes', nargs='+', type=int, default=SIZES, help='of --sweep')
    parser.add_argument(
        '--max-seconds', type=float, default=20.0, help='of --sweep: slower models stop there'
    )
    parser.add_argument('--batch-size', type=int, default=1)
    parser.add_argument(
        '--device', choices=['cpu', 'cuda'], default='cuda' if torch.cuda.is_available() else 'cpu'
    )
    parser.add_argument(
        '--dtype',
        choices=['float32', 'bfloat16', 'autocast'],
        default='float32',
        help='of weights and images; autocast: to bfloat16, of float32',
    )
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--threads', type=int, help="CPU threads; default: PyTorch's, 2 for --bars")
    parser.add_argument(
        '--rounds', type=int, help='rounds of timing; default: 10, 7 for --bars, 5 for --sweep'
    )
    parser.add_argument(
        '--no-memory', action='store_true', help='save the seconds that each takes for its memory'
    )
    parser.add_argument(
        '--memory-limit', type=float, metavar='GIB', help='memory that one model may take'
    )
    parser.add_argument(
        '--out',
        default='work_dirs/analysis/benchmark_backbones',
        help='path of the files, without suffix; default: %(default)s',
    )
    args = parser.parse_args()
    if args.sweep and (args.compile or args.no_memory):
        parser.error('--sweep is eager and measures memory: leave out --compile and --no-memory')
    if args.rounds is None:
        args.rounds = 7 if args.bars else 5 if args.sweep else 10
    return args


def check_bars(args: argparse.Namespace) -> None:
    execution = Execution(threads=2 if args.threads is None else args.threads)
    rows = []
    for bar in bars.measure_bars(execution, args.rounds):
        rows.append(bar.row())
        print(f'{bar.what}, {bar.shape}: {bar.ratio:.3g}', file=sys.stderr)
    source = provenance('cpu', torch.float32, rounds=args.rounds)
    write_report(args.out, rows, source)
    print(f'{place(source)}, float32, eager, {args.rounds} rounds\n')
    print(format_table(rows, bars.COLUMNS))
    print(f'{args.out}.json, .csv')


def place(source: dict) -> str:
    return f'{source["device"]}, CPU threads: {source["threads"]}'


def read_setting(args: argparse.Namespace) -> Setting:
    shape = padded(args.shape)
    return Setting(
        batch_size=args.batch_size,
        device=args.device,
        dtype=torch.bfloat16 if args.dtype == 'bfloat16' else torch.float32,
        threads=torch.get_num_threads() if args.threads is None else args.threads,
        train_step=args.mode == 'train',
        shape=shape,
        maps=args.sweep or shape != (224, 224),
        autocast=args.dtype == 'autocast',
        channels_last=args.channels_last,
    )


def measure(args: argparse.Namespace, setting: Setting) -> List[dict]:
    models = args.models or (SWEPT if args.sweep else COMPARED)
    args.reference = args.reference or ('pvt_v2_b0' if 'pvt_v2_b0' in models else models[0])
    if args.reference not in models:
        raise ValueError(
            f'the reference {args.reference!r} must be among the models that are measured'
        )
    rows = []
    if args.sweep:
        limits = (args.memory_limit, args.max_seconds)
        for row in sweep(models, args.sizes, setting, args.rounds, *limits):
            rows.append(row)
            print(f'{row["model"]}, {row["width"]} pixels: {row["status"]}', file=sys.stderr)
    else:
        forms = ('trained',) if setting.train_step else args.forms
        variants = variants_of(models, forms, args.compile)
        memory = not args.no_memory
        rows = measure_backbones(variants, setting, args.rounds, memory, args.memory_limit)
    add_ratios(rows, args.reference)
    return rows


def title(args: argparse.Namespace, setting: Setting, source: dict) -> str:
    size = '' if args.sweep else ' of {} x {}'.format(*setting.shape)
    outputs = 'four feature maps' if setting.maps else 'pooled features'
    layout = ', channels-last' * setting.channels_last
    return f'{args.mode}, batch of {setting.batch_size}{size}, {outputs}, {args.dtype}{layout}\n{place(source)}'


def main() -> None:
    args = parse_args()
    if importlib.util.find_spec('timm') is None:
        raise UsageError('the other backbones come from timm, which is missing: pip install timm')
    try:
        if args.bars:
            check_bars(args)
            return
        setting = read_setting(args)
        rows = measure(args, setting)
    except ValueError as error:
        raise UsageError(str(error)) from error
    except ProcessDiedError as error:
        raise UsageError(f'PyTorch crashed ({error}): leave models out by --models') from error

    torch.set_num_threads(setting.threads)  # what the provenance states
    stated = {key: getattr(args, key) for key in STATED}
    source = provenance(args.device, setting.dtype, autocast=setting.autocast, **stated)
    write_report(args.out, rows, source)
    heading = title(args, setting, source)
    (plot_sweep if args.sweep else plot_accuracy)(rows, heading, Path(args.out))
    print(heading.replace('\n', '; '), end='\n\n')
    print(format_table(rows, COLUMNS))
    print(f'{args.out}.json, .csv, .png')


if __name__ == '__main__':
    run(main)

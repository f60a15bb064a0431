# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Count what one step of a backbone would do on a GPU. No GPU is needed, and nothing is timed.

A launch is an operation that is not a view. One operation may be several kernels. "Moved" is the size of
the inputs and outputs of all operations. "Saved" is what the forward pass keeps for the backward pass. The
lower bound is the time that an H100 needs to move the bytes (3.35 TB/s) or to launch the operations (4 us
each), whichever is longer.
"""

import argparse
import shutil
from itertools import product
from typing import List, Optional

from mmlinglo.analysis import launches
from mmlinglo.analysis.peers import ALL
from mmlinglo.analysis.report import (
    at_least,
    explain_errors,
    format_table,
    make_parser,
    provenance,
    write_report,
)
from mmlinglo.utils.cli import run

MODELS = [f'{family}_b{size}' for size in range(3) for family in ('linglo', 'pvt_v2')]


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = make_parser(__doc__, 'count_launches')
    add, text = parser.add_argument, f'models, among {", ".join(ALL)}'
    add('--models', nargs='+', metavar='NAME', default=MODELS, help=text)
    text = '; '.join(f'{form}: {what}' for form, what in launches.FORMS.items())
    text = f'forms of LinGlo; {text}'
    add('--forms', nargs='+', choices=launches.FORMS, default=['plain'], help=text)
    text = 'default: train, forward and backward'
    add('--modes', nargs='+', choices=launches.MODES, default=['train'], help=text)
    text = 'autocast; default: none'
    add('--amp', nargs='+', choices=launches.AMP, default=['none'], help=text)
    add('--batch-size', type=at_least(1), default=8, help='default: %(default)s')
    text = 'image size in pixels; default: 224 224, for pooled features; otherwise four maps'
    size = dict(nargs=2, type=at_least(64), metavar=('H', 'W'), default=(224, 224))
    add('--shape', **size, help=text)
    text = 'count, for a forward pass in float32, what torch.compile makes for a CPU too'
    add('--compiled', action='store_true', help=text)
    add('--channels-last', action='store_true', help='layout of images and kernels')
    args = parser.parse_args(argv)
    if args.compiled and ('train' in args.modes or args.amp != ['none']):
        parser.error('--compiled needs --modes eval or deploy, without --amp')
    if args.compiled and not shutil.which('g++'):
        parser.error('--compiled needs g++: on Debian or Ubuntu, apt-get install g++')
    return args


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    images, rows = (args.batch_size, 3, *args.shape), []
    for name, mode, amp in product(args.models, args.modes, args.amp):
        forms = args.forms if name.startswith('linglo_b') else ['plain']
        for form in forms:
            with explain_errors():
                model = launches.build_form(name, args.shape, mode, form)
                counts = launches.count_launches(model, images, amp, args.channels_last)
            row = dict(model=name, form=form, mode=mode, amp=amp)
            row['images'] = '{} x {} x {}'.format(args.batch_size, *args.shape)
            rows.append({**row, **counts.row()})
            if args.compiled:
                kernels = launches.count_compiled_kernels(model, images)
                rows[-1].update(zip(launches.COMPILED, kernels))
    source = provenance('cpu', counted='with CUDA tensors without data; nothing was timed')
    write_report(args.out, rows, source)
    print(format_table(rows, list(rows[0])), f'{args.out}.json, .csv', sep='\n')
    return 0


if __name__ == '__main__':
    run(main)

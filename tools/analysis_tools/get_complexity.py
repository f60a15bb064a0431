# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Count parameters and operations of a classifier, detector or segmentor for one image.

Prints them for each part and operator, in the training form (as evaluated) and re-parameterised, and
writes <out>.json, <out>.csv and <out>.png. What is counted, and how: mmlinglo/analysis/complexity.py.
"""

import argparse
from pathlib import Path

import torch

from mmlinglo.analysis.complexity import (
    complexity_rows,
    count_forms,
    image_shape,
    padded_shape,
    plot_complexity,
)
from mmlinglo.analysis.report import format_table, provenance, with_suffix, write_report
from mmlinglo.utils.cli import UsageError, config_parser, load_config, run
from mmlinglo.utils.deploy import build_model


def parse_args() -> argparse.Namespace:
    parser = config_parser(__doc__)
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        metavar=('HEIGHT', 'WIDTH'),
        help='size of the image in pixels, before the data preprocessor pads it; '
        'default: what the config tests classifiers and detectors with and trains segmentors with',
    )
    parser.add_argument(
        '--out',
        default='work_dirs/analysis/get_complexity',
        help='where to write, without suffix; default: %(default)s',
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    if cfg.model.get('backbone', {}).get('deploy', False):
        raise UsageError(
            f'{args.config} builds the deployed form: drop model.backbone.deploy, '
            'both forms are counted'
        )
    model = build_model(cfg).eval()
    try:
        given = tuple(args.shape or image_shape(cfg))
    except ValueError as error:
        raise UsageError(f'{args.config}: {error}, so give --shape') from error
    if min(given) < 1:
        raise UsageError(f'--shape must be two positive numbers of pixels, got {given}')
    shape = padded_shape(model, given)
    try:
        forms = count_forms(model, shape)
    except ValueError as error:
        raise UsageError(f'{args.config} at {shape[0]} x {shape[1]}: {error}') from error

    rows = complexity_rows(forms)
    out = Path(args.out)
    source = provenance('cpu', torch.float32, config=args.config, shape=shape, batch_size=1)
    write_report(out, rows, source)
    title = f'{Path(args.config).stem}, one image of {shape[0]} x {shape[1]}'
    plot_complexity(rows, title, with_suffix(out, '.png'))
    print(title)
    headings = dict(
        params_m='params (M)', macs_g='multiply-adds (G)', elementwise_g='other operations (G)'
    )
    parts = [row for row in rows if row['operator'] == 'all']
    operators = [row for row in rows if row['operator'] != 'all' and row['part'] == 'total']
    print(format_table(parts, dict(form='form', part='part', **headings)))
    del headings['params_m']
    print(format_table(operators, dict(form='form', operator='operator', **headings)))
    print(f'written: {out}.json, .csv and .png')


if __name__ == '__main__':
    run(main)

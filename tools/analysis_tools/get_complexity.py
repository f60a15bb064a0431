# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Count the parameters and multiply-adds of a classifier, detector or segmentor for one image.

The tool prints them by part and operator, for the training form (in evaluation mode) and for the deployed
form. It writes <out>.json, <out>.csv and <out>.png. mmlinglo/analysis/complexity.py says what it counts.
"""

import argparse
from pathlib import Path
from typing import List, Optional

from mmlinglo.analysis.complexity import complexity_rows, count_forms, image_shape, padded_shape
from mmlinglo.analysis.figures import plot_complexity
from mmlinglo.analysis.report import format_table, provenance, write_report
from mmlinglo.utils.cli import UsageError, config_parser, load_config, run
from mmlinglo.utils.deploy import build_model


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = config_parser(__doc__)
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        metavar=('HEIGHT', 'WIDTH'),
        help='size of the image in pixels, before the data preprocessor pads it; default: the test '
        'size of a classifier or detector, the training crop of a segmentor',
    )
    parser.add_argument(
        '--out',
        default='work_dirs/analysis/get_complexity',
        help='path of the files, without suffix; default: %(default)s',
    )
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    cfg = load_config(args.config, args.cfg_options)
    if cfg.model.get('backbone', {}).get('deploy', False):
        raise UsageError(
            f'{args.config} builds the deployed form: remove model.backbone.deploy; the tool counts both'
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
        rows = complexity_rows(count_forms(model, shape))
    except ValueError as error:
        raise UsageError(f'{args.config} at {shape[0]} x {shape[1]}: {error}') from error

    source = provenance('cpu', config=args.config, shape=shape, batch_size=1)
    write_report(args.out, rows, source)
    title = f'{Path(args.config).stem}, One Image of {shape[0]} x {shape[1]} Pixels'
    plot_complexity(rows, title, args.out)
    columns = dict(form='form', part='part', params_m='params (M)', macs_g='multiply-adds (G)')
    print(title)
    print(format_table([row for row in rows if row['operator'] == 'all'], columns))
    columns = dict(form='form', operator='operator', macs_g='multiply-adds (G)')
    total = [row for row in rows if row['part'] == 'total' and row['operator'] != 'all']
    print(format_table(total, columns))
    print(f'written: {args.out}.json, .csv and .png')
    return 0


if __name__ == '__main__':
    run(main)

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Count the parameters and multiply-adds of a classifier, detector or segmentor for one image.

The tool prints them by part and operator, for the training form (in evaluation mode) and for the deployed
form. It writes <out>.json, <out>.csv and <out>.png. mmlinglo/analysis/complexity.py says what it counts.
"""

from pathlib import Path
from typing import List, Optional

from mmlinglo.analysis.complexity import complexity_rows, count_forms, image_shape, padded_shape
from mmlinglo.analysis.figures import plot_complexity
from mmlinglo.analysis.report import at_least, format_table, provenance, write_report
from mmlinglo.utils.cli import UsageError, config_parser, load_config, run
from mmlinglo.utils.deploy import build_model


def main(argv: Optional[List[str]] = None) -> int:
    parser = config_parser(__doc__)
    add, size = parser.add_argument, dict(nargs=2, type=at_least(1), metavar=('HEIGHT', 'WIDTH'))
    text = 'size of the image in pixels, before the data preprocessor pads it; default: the test '
    text += 'size of a classifier or detector, the training crop of a segmentor'
    add('--shape', **size, help=text)
    text = 'path of the files, without suffix; default: %(default)s'
    add('--out', default='work_dirs/analysis/get_complexity', help=text)
    args = parser.parse_args(argv)
    cfg = load_config(args.config, args.cfg_options)
    if cfg.model.get('backbone', {}).get('deploy', False):
        raise UsageError(
            f'{args.config} builds the deployed form: remove model.backbone.deploy; the tool counts both'
        )
    model, shape = build_model(cfg).eval(), args.shape
    try:
        shape = padded_shape(model, shape or image_shape(cfg))
        rows = complexity_rows(count_forms(model, shape))
    except ValueError as error:
        where = f'{args.config} at {shape[0]} x {shape[1]}' if shape else args.config
        raise UsageError(f'{where}: {error}') from error
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

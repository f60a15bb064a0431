# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Find mistakes in a data set that make a training fail, or silently learn something wrong.

The tool reads the training, validation and test data of a config. It checks all annotations, and opens all images and
label images, or a sample of them. For each finding, it prints the files and the remedy. The exit status is 1 if there
are errors, and 0 if there are only warnings. docs/custom_dataset.md lists all checks.
"""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Optional, Sequence

from mmlinglo.utils.cli import UsageError, config_parser, load_config, run
from mmlinglo.utils.files import complete_file


def parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = config_parser(__doc__)
    parser.add_argument(
        '--num',
        default='2000',
        help='images to open of each data set, evenly spaced, or "all"; default: %(default)s',
    )
    parser.add_argument(
        '--workers',
        type=int,
        default=min(8, os.cpu_count() or 1),
        help='processes that open images; default: %(default)s',
    )
    parser.add_argument(
        '--places', type=int, default=3, help='places to print for each finding; default: 3'
    )
    parser.add_argument('--out', help='JSON file for the report, which then holds all places')
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Check the data sets of a config.

    Returns:
        1 if there are errors, else 0.

    Raises:
        UsageError: If an argument is wrong, or a package is missing.
    """
    args = parse_args(argv)
    if args.num != 'all' and not (args.num.isdecimal() and int(args.num) > 0):
        raise UsageError(f'--num must be a positive number or "all", got {args.num!r}')
    if args.workers < 1 or args.places < 1:
        raise UsageError(
            f'--workers and --places must be positive, got {args.workers} and {args.places}'
        )
    try:
        from mmlinglo.dataset_checks import check_datasets
    except ImportError as error:
        raise UsageError(f'checking data sets needs {error.name}: pip install it') from error
    cfg = load_config(args.config, args.cfg_options)
    warnings.filterwarnings('ignore', message='`reduce_zero_label` will be deprecated')
    report = check_datasets(
        cfg,
        num=None if args.num == 'all' else int(args.num),
        workers=args.workers,
        progress=sys.stderr if sys.stderr.isatty() else None,
        overridden=list(args.cfg_options or {}),
    )
    if not report.datasets and not report.findings:
        raise UsageError(f'config {args.config!r} has no train, val or test_dataloader')
    if args.out is not None:
        with complete_file(Path(args.out)) as path:
            path.write_text(json.dumps(dict(config=args.config, **report.as_dict()), indent=2))
    sys.stdout.reconfigure(errors='backslashreplace')  # names may hold what no terminal can show
    print(report.format(args.places))
    return 1 if report.count('error') else 0


if __name__ == '__main__':
    run(main)

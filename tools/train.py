# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Train a classifier, detector or segmentor."""

import argparse
from typing import Optional, Sequence

import torch

from mmlinglo.engine import TrainingRunner, end_with_torchrun
from mmlinglo.utils.cli import UsageError, check_data_files, load_runner_config, run, runner_parser


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = runner_parser(__doc__)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='resume from this checkpoint; without a value, from the latest one in the work dir',
    )
    parser.add_argument('--amp', action='store_true', help='mixed-precision training')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the actual batch size of an optimizer step, over all '
        'processes and accumulated batches, relative to auto_scale_lr.base_batch_size',
    )
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_args(argv)
    end_with_torchrun()
    cfg = load_runner_config(args)
    check_data_files(cfg, args.config, 'train', *(['val'] if cfg.get('val_cfg') else []))
    if args.amp:
        if not torch.cuda.is_available():
            raise UsageError('--amp needs a GPU')
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.loss_scale = 'dynamic'
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise UsageError(
                f'--auto-scale-lr needs auto_scale_lr.base_batch_size in {args.config}'
            )
        cfg.auto_scale_lr.enable = True
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    TrainingRunner.from_cfg(cfg).train()
    return 0


if __name__ == '__main__':
    run(main)

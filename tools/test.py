# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Evaluate a checkpoint of a classifier, detector or segmentor."""

import argparse
import os.path as osp
from typing import Any, Optional, Sequence

from mmengine.config import Config
from mmengine.model import is_model_wrapper

from mmlinglo.checkpoint import find_state_dict
from mmlinglo.engine import QuietRunner
from mmlinglo.utils import load_checkpoint_file, load_model_weights
from mmlinglo.utils.cli import (
    UsageError,
    check_data_files,
    load_runner_config,
    run,
    runner_parser,
    type_name,
)

LABEL_WRITERS = ('IoUMetric', 'CityscapesMetric')  # metrics of mmseg that take output_dir


class StrictRunner(QuietRunner):
    """Runner that loads the given checkpoint completely or not at all."""

    checkpoint: dict

    def load_checkpoint(self, filename: str, *_: Any, **__: Any) -> dict:
        # with the keys that EMAHook expects
        self.checkpoint = dict(self.checkpoint, state_dict=find_state_dict(self.checkpoint))
        self.call_hook('after_load_checkpoint', checkpoint=self.checkpoint)
        model = self.model.module if is_model_wrapper(self.model) else self.model
        load_model_weights(model, self.checkpoint, filename)
        self.logger.info(f'Load checkpoint from {filename}')
        return self.checkpoint


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = runner_parser(__doc__)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out',
        help='save the predictions: a .pkl file for classifiers and detectors, a folder of label '
        'images for segmentors',
    )
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--show-dir', help='folder for images with the predictions drawn on them')
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds that a window stays open; default: 2'
    )
    return parser.parse_args(argv)


def enable_visualization(cfg: Config, args: argparse.Namespace) -> None:
    """Turn on the visualization hook; each toolbox names its settings in its own way."""
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise UsageError(f'--show and --show-dir need default_hooks.visualization in {args.config}')
    hook.update(show=args.show, wait_time=args.wait_time, interval=1)
    hook['enable' if cfg.default_scope == 'mmpretrain' else 'draw'] = True
    if args.show_dir is not None:
        show_dir = osp.abspath(args.show_dir)
        if cfg.default_scope == 'mmpretrain':
            hook.out_dir = show_dir
        elif cfg.default_scope == 'mmdet':
            hook.test_out_dir = show_dir
        else:
            cfg.visualizer.save_dir = show_dir


def save_predictions(cfg: Config, args: argparse.Namespace) -> None:
    """Make a metric write ``--out``: mmseg's own metric, or an additional one in the other toolboxes.

    Raises:
        UsageError: If ``--out`` is of the wrong kind, or no metric writes label images.
    """
    to_folder = cfg.default_scope == 'mmseg'
    if args.out.endswith(('.pkl', '.pickle')) == to_folder:
        expected = 'a folder' if to_folder else 'a .pkl file'
        raise UsageError(f'--out must be {expected} for this config, got {args.out!r}')
    evaluators = cfg.get('test_evaluator') or []
    evaluators = [evaluators] if isinstance(evaluators, dict) else list(evaluators)
    if to_folder:
        writers = [each for each in evaluators if type_name(each['type']) in LABEL_WRITERS]
        if not writers:
            kinds = [type_name(each['type']) for each in evaluators]
            raise UsageError(
                f'--out needs one of {", ".join(LABEL_WRITERS)} in test_evaluator, '
                f'{args.config} has {", ".join(kinds) or "none"}'
            )
        writers[0].update(output_dir=args.out, keep_results=True)
    else:
        dump = 'DumpDetResults' if cfg.default_scope == 'mmdet' else 'DumpResults'
        evaluators.append(dict(type=dump, out_file_path=args.out))
    cfg.test_evaluator = evaluators


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_args(argv)
    cfg = load_runner_config(args)
    if args.show or args.show_dir is not None:
        enable_visualization(cfg, args)
    if args.out is not None:
        save_predictions(cfg, args)
    checkpoint = load_checkpoint_file(args.checkpoint, args.trust_checkpoint)
    check_data_files(cfg, args.config, 'test')
    cfg.load_from = args.checkpoint
    runner = StrictRunner.from_cfg(cfg)
    runner.checkpoint = checkpoint
    runner.test()
    return 0


if __name__ == '__main__':
    run(main)

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Evaluate a checkpoint of a classifier, detector or segmentor."""

import argparse
import os.path as osp

from mmengine.config import Config
from mmengine.evaluator import DumpResults
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from mmlinglo.utils import load_checkpoint_file, load_model_weights
from mmlinglo.utils.cli import UsageError, load_runner_config, run, runner_parser


def parse_args() -> argparse.Namespace:
    parser = runner_parser(__doc__)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out',
        help='save the predictions: a .pkl file for classifiers and detectors, a folder of label '
        'images for segmentors',
    )
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--show-dir', help='folder for pictures of the predictions')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds a window stays')
    return parser.parse_args()


def enable_visualization(cfg: Config, args: argparse.Namespace) -> None:
    """Turn on the visualization hook; each toolbox names its settings in its own way."""
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise UsageError(f'--show and --show-dir need default_hooks.visualization in {args.config}')
    hook.update(show=args.show, wait_time=args.wait_time)
    hook['enable' if cfg.default_scope == 'mmpretrain' else 'draw'] = True
    if args.show_dir is not None:
        show_dir = osp.abspath(args.show_dir)
        if cfg.default_scope == 'mmpretrain':
            hook.out_dir = show_dir
        elif cfg.default_scope == 'mmdet':
            hook.test_out_dir = show_dir
        else:
            cfg.visualizer.save_dir = show_dir


def main() -> None:
    args = parse_args()
    segmentation = False
    if args.out is not None and not args.out.endswith(('.pkl', '.pickle')):
        segmentation = True
    cfg = load_runner_config(args)
    if args.out is not None and segmentation != (cfg.default_scope == 'mmseg'):
        expected = 'a folder' if cfg.default_scope == 'mmseg' else 'a .pkl file'
        raise UsageError(f'--out must be {expected} for this config, got {args.out!r}')
    if args.show or args.show_dir is not None:
        enable_visualization(cfg, args)
    if segmentation:
        cfg.test_evaluator.update(output_dir=args.out, keep_results=True)
    checkpoint = load_checkpoint_file(args.checkpoint)
    cfg.load_from = None

    runner = Runner.from_cfg(cfg)
    if args.out is not None and not segmentation:
        runner.test_evaluator.metrics.append(dump_metric(cfg.default_scope, args.out))
    # As Runner.load_checkpoint does, but strict and without running code from the file.
    runner.call_hook('after_load_checkpoint', checkpoint=checkpoint)
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    load_model_weights(model, checkpoint, args.checkpoint)
    runner.test()


def dump_metric(scope: str, out: str) -> DumpResults:
    """Metric that saves the predictions; mmdet's encodes masks compactly."""
    if scope == 'mmdet':
        from mmdet.evaluation import DumpDetResults

        return DumpDetResults(out_file_path=out)
    return DumpResults(out_file_path=out)


if __name__ == '__main__':
    run(main)

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Run a classifier, detector or segmentor on a picture, a folder of pictures or a video.

OUT_DIR gets the input with boxes, masks or labels drawn on it in `vis/` and the predictions in `preds/`: JSON for
each picture, for a video a line of JSON for each frame; for segmentors label images as well. Pictures are read as the
config's test pipeline reads them. Folders are searched with their sub-folders. Files that cannot be read are
reported, the rest is done, and the exit status is 1.
"""

import argparse
import sys
from pathlib import Path
from typing import List, Optional

import mmcv
from rich.console import Console
from rich.progress import track

from mmlinglo.utils import cli, inference, load_checkpoint_file
from mmlinglo.utils.cli import UsageError
from mmlinglo.utils.deploy import count_input_channels
from mmlinglo.utils.inference import DRAWINGS, PICTURE_SUFFIXES, PREDICTIONS, Predictor

SCREEN = Console(stderr=True)


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = cli.config_parser(__doc__)
    add = parser.add_argument
    add('checkpoint', help='checkpoint file')
    add('input', type=Path, help='a picture, a folder of pictures or a video')
    add('--out-dir', type=Path, default='outputs', help='folder for the results')
    add('--device', help='such as cpu or cuda:0; default: the first GPU, else cpu')
    add('--batch-size', type=int, default=1, help='pictures or frames at a time')
    add('--score-thr', type=float, default=0.3, help='lowest score of drawn boxes')
    add('--deploy', action='store_true', help='re-parameterise the model first')
    cli.add_trust_argument(parser)
    return parser.parse_args(argv)


def infer_pictures(predictor: Predictor, args: argparse.Namespace) -> None:
    folder, names, others = args.input.parent, [args.input.name], 0
    vis, preds = args.out_dir / DRAWINGS, args.out_dir / PREDICTIONS
    if args.input.is_dir():
        folder, files = args.input, list(inference.list_files(args.input, skip=(vis, preds)))
        names = [x for x in files if x.lower().endswith(PICTURE_SUFFIXES)]
        others = len(files) - len(names)
    if not names:
        raise UsageError(f'no pictures ({", ".join(PICTURE_SUFFIXES)}) in {str(folder)!r}')
    skipped = 0
    steps = inference.annotate_pictures(predictor, folder, names, args.out_dir, args.batch_size)
    for name, problem in track(steps, 'Inference', len(names), console=SCREEN):
        if problem is not None:
            skipped += 1
            print(f'{folder / name}: skipped: {problem}', file=sys.stderr)
    print(f'{len(names) - skipped} pictures in {vis}, predictions in {preds}')
    if others:
        print(f'{others} files of other kinds passed over')
    if skipped:
        raise UsageError(f'{skipped} of {len(names)} pictures skipped, see above')


def infer_video(predictor: Predictor, args: argparse.Namespace) -> None:
    channels = count_input_channels(predictor.model)
    if channels != 3:
        raise UsageError(f'{args.config} takes images of {channels} channels, videos have 3')
    source, out_dir = args.input, args.out_dir
    reader = mmcv.VideoReader(str(source))
    if not reader.opened:
        raise UsageError(f'video {str(source)!r}: no video that OpenCV can read')
    steps = inference.annotate_video(predictor, reader, source.name, out_dir, args.batch_size)
    try:
        done = sum(1 for _ in track(steps, 'Inference', reader.frame_cnt or None, console=SCREEN))
    except inference.UnreadableError as error:
        raise UsageError(f'video {str(source)!r}: {error}') from error
    print(f'{done} frames in {out_dir / DRAWINGS}, predictions in {out_dir / PREDICTIONS}')


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    if args.batch_size < 1:
        raise UsageError(f'--batch-size must be at least 1, got {args.batch_size}')
    cfg = cli.load_config(args.config, args.cfg_options)
    if not args.input.exists():
        raise UsageError(f'input {str(args.input)!r} not found')
    path, out = args.input.resolve(), args.out_dir.resolve()
    if path == out or any(path.is_relative_to(out / name) for name in (DRAWINGS, PREDICTIONS)):
        raise UsageError(
            f'input {str(args.input)!r} is --out-dir {str(args.out_dir)!r} itself, or lies in its '
            f'{DRAWINGS!r} or {PREDICTIONS!r}, where results go: name another --out-dir'
        )
    device = cli.checked_device(args.device)
    checkpoint = load_checkpoint_file(args.checkpoint, args.trust_checkpoint)
    settings = dict(device=device, score_thr=args.score_thr, deploy=args.deploy)
    try:
        predictor = Predictor(cfg, checkpoint, args.checkpoint, **settings)
    except ValueError as error:
        raise UsageError(f'{args.config}: {error}') from error
    print(f'{args.checkpoint}: loaded, predicting on {device}', file=sys.stderr)
    video = args.input.is_file() and args.input.name.lower().endswith(inference.VIDEO_SUFFIXES)
    try:
        (infer_video if video else infer_pictures)(predictor, args)
    except OSError as error:
        raise UsageError(str(error)) from error  # names the file
    return 0


if __name__ == '__main__':
    cli.run(main)

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Run a classifier, detector or segmentor on a picture, a folder of pictures or a video.

OUT_DIR gets the input with boxes, masks or labels drawn on it in `vis/` and the predictions in `preds/`: JSON
for each picture, for a video a line of JSON for each frame; for segmentors label images as well. Folders are
searched with their sub-folders. Files that cannot be read are reported, the rest is done, and the exit status is 1.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Callable, Iterable

from rich.console import Console
from rich.progress import track

from mmlinglo.utils import load_checkpoint_file
from mmlinglo.utils.cli import (
    UsageError,
    add_trust_argument,
    checked_device,
    config_parser,
    load_config,
    run,
)
from mmlinglo.utils.inference import (
    DRAWINGS,
    PICTURE_SUFFIXES,
    PREDICTIONS,
    Predictor,
    UnreadableError,
    annotate_pictures,
    annotate_video,
    build_predictor,
    is_picture,
    is_video,
    list_files,
    open_video,
)


def parse_args() -> argparse.Namespace:
    parser = config_parser(__doc__)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('input', help='a picture, a folder of pictures or a video')
    parser.add_argument('--out-dir', default='outputs', help='folder for the results')
    parser.add_argument('--device', help='such as cpu or cuda:0; default: the first GPU, else cpu')
    parser.add_argument('--batch-size', type=int, default=1, help='pictures or frames at a time')
    parser.add_argument('--score-thr', type=float, default=0.3, help='lowest score of drawn boxes')
    parser.add_argument(
        '--deploy', action='store_true', help='re-parameterise the model before running it'
    )
    add_trust_argument(parser)
    return parser.parse_args()


def check_folders(source: Path, out_dir: Path) -> None:
    """Refuse to write over the input."""
    if not source.exists():
        raise UsageError(f'input {str(source)!r} not found')
    path, out = source.resolve(), out_dir.resolve()
    if path == out:
        raise UsageError(f'--out-dir {str(out_dir)!r} is the input itself: name another folder')
    for results in (out / DRAWINGS, out / PREDICTIONS):
        if results in (path, *path.parents):
            raise UsageError(
                f'input {str(source)!r} lies in {str(results)!r}, where results go: '
                'name another --out-dir'
            )


def progress(steps: Iterable, total: int) -> Iterable:
    return track(steps, 'Inference', total=total or None, console=Console(stderr=True))


def infer_pictures(build: Callable[[], Predictor], source: Path, args: argparse.Namespace) -> None:
    out_dir = Path(args.out_dir)
    if source.is_dir():
        folder, skip = source, (out_dir / DRAWINGS, out_dir / PREDICTIONS)
        # Listed twice rather than kept: folders may be very large.
        counts = Counter(map(is_picture, list_files(folder, skip)))
        names = filter(is_picture, list_files(folder, skip))
    else:
        folder, counts, names = source.parent, Counter([True]), [source.name]
    if not counts[True]:
        raise UsageError(f'no pictures ({", ".join(PICTURE_SUFFIXES)}) in {str(source)!r}')

    outcomes: Counter = Counter()
    steps = annotate_pictures(build(), folder, names, out_dir, args.batch_size)
    for name, problem in progress(steps, counts[True]):
        outcomes[problem is None] += 1
        if problem is not None:
            print(f'{folder / name}: skipped: {problem}', file=sys.stderr)
    print(
        f'{outcomes[True]} pictures in {out_dir / DRAWINGS}, predictions in {out_dir / PREDICTIONS}'
    )
    if counts[False]:
        print(f'{counts[False]} files of other kinds passed over')
    if outcomes[False]:
        raise UsageError(
            f'{outcomes[False]} of {sum(outcomes.values())} pictures skipped, see above'
        )


def infer_video(build: Callable[[], Predictor], source: Path, args: argparse.Namespace) -> None:
    out_dir = Path(args.out_dir)
    try:
        reader = open_video(source)
        steps = annotate_video(build(), reader, source.name, out_dir, args.batch_size)
        done = sum(1 for _ in progress(steps, reader.frame_cnt))
    except UnreadableError as error:
        raise UsageError(f'video {str(source)!r}: {error}') from error
    print(f'{done} frames in {out_dir / DRAWINGS}, predictions in {out_dir / PREDICTIONS}')


def main() -> None:
    args = parse_args()
    if args.batch_size < 1:
        raise UsageError(f'--batch-size must be at least 1, got {args.batch_size}')
    cfg = load_config(args.config, args.cfg_options)
    source = Path(args.input)
    check_folders(source, Path(args.out_dir))
    device = checked_device(args.device)

    def build() -> Predictor:
        checkpoint = load_checkpoint_file(args.checkpoint, args.trust_checkpoint)
        try:
            return build_predictor(
                cfg, checkpoint, args.checkpoint, device, args.score_thr, args.deploy
            )
        except ValueError as error:
            raise UsageError(f'{args.config}: {error}') from error

    infer = infer_video if source.is_file() and is_video(source.name) else infer_pictures
    try:
        infer(build, source, args)
    except OSError as error:
        raise UsageError(str(error)) from error  # names the file


if __name__ == '__main__':
    run(main)

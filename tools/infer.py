# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Run a classifier, detector or segmentor on a picture, a folder of pictures or a video.

OUT_DIR gets the input with boxes, masks or labels drawn on it in `vis/` and the predictions in `preds/`: JSON for
each picture, for a video a line of JSON for each frame; for segmentors label images as well. `classes.json` lists
the names of the classes in the order of their numbers. Pictures are read as the config's test pipeline reads them.
Folders are searched with their sub-folders. Files that cannot be read are reported, the rest is done, and the exit
status is 1.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Callable, Iterable, List, Optional

from rich.console import Console
from rich.progress import track

from mmlinglo.utils import cli, inference, load_checkpoint_file
from mmlinglo.utils.cli import UsageError
from mmlinglo.utils.deploy import count_input_channels
from mmlinglo.utils.files import complete_file
from mmlinglo.utils.inference import DRAWINGS, PICTURE_SUFFIXES, PREDICTIONS, Predictor

CLASSES = 'classes.json'  # names of the classes, in the folder of the results


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = cli.config_parser(__doc__)
    add = parser.add_argument
    add('checkpoint', help='checkpoint file')
    add('input', help='a picture, a folder of pictures or a video')
    add('--out-dir', default='outputs', help='folder for the results')
    add('--device', help='such as cpu or cuda:0; default: the first GPU, else cpu')
    add('--batch-size', type=int, default=1, help='pictures or frames at a time')
    add('--score-thr', type=float, default=0.3, help='lowest score of drawn boxes')
    add('--deploy', action='store_true', help='re-parameterise the model first')
    cli.add_trust_argument(parser)
    return parser.parse_args(argv)


def check_folders(source: Path, out_dir: Path) -> None:
    """Refuse to write over the input."""
    if not source.exists():
        raise UsageError(f'input {str(source)!r} not found')
    path, out = source.resolve(), out_dir.resolve()
    if path == out:
        raise UsageError(f'--out-dir {str(out_dir)!r} is the input itself: name another folder')
    for results in (out / DRAWINGS, out / PREDICTIONS):
        if results in (path, *path.parents):
            message = f'input {str(source)!r} lies in {str(results)!r}, where results go'
            raise UsageError(f'{message}: name another --out-dir')


def progress(steps: Iterable, total: int) -> Iterable:
    return track(steps, 'Inference', total=total or None, console=Console(stderr=True))


def infer_pictures(build: Callable[[], Predictor], source: Path, args: argparse.Namespace) -> None:
    out_dir = Path(args.out_dir)
    folder, names, others = source.parent, [source.name], 0
    if source.is_dir():
        listed = inference.list_files(source, (out_dir / DRAWINGS, out_dir / PREDICTIONS))
        files = [x for x in listed if source / x != out_dir / CLASSES]
        folder, names = source, [x for x in files if x.lower().endswith(PICTURE_SUFFIXES)]
        others = len(files) - len(names)
    if not names:
        raise UsageError(f'no pictures ({", ".join(PICTURE_SUFFIXES)}) in {str(source)!r}')
    skipped = 0
    steps = inference.annotate_pictures(build(), folder, names, out_dir, args.batch_size)
    for name, problem in progress(steps, len(names)):
        if problem is not None:
            skipped += 1
            print(f'{folder / name}: skipped: {problem}', file=sys.stderr)
    done = len(names) - skipped
    print(f'{done} pictures in {out_dir / DRAWINGS}, predictions in {out_dir / PREDICTIONS}')
    if others:
        print(f'{others} files of other kinds passed over')
    if skipped:
        raise UsageError(f'{skipped} of {len(names)} pictures skipped, see above')


def infer_video(build: Callable[[], Predictor], source: Path, args: argparse.Namespace) -> None:
    out_dir = Path(args.out_dir)
    try:
        reader = inference.open_video(source)
        predictor = build()
        channels = count_input_channels(predictor.model)
        if channels != 3:
            raise UsageError(f'{args.config} takes images of {channels} channels, videos have 3')
        steps = inference.annotate_video(predictor, reader, source.name, out_dir, args.batch_size)
        done = sum(1 for _ in progress(steps, reader.frame_cnt))
    except inference.UnreadableError as error:
        raise UsageError(f'video {str(source)!r}: {error}') from error
    print(f'{done} frames in {out_dir / DRAWINGS}, predictions in {out_dir / PREDICTIONS}')


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    if args.batch_size < 1:
        raise UsageError(f'--batch-size must be at least 1, got {args.batch_size}')
    cfg = cli.load_config(args.config, args.cfg_options)
    source = Path(args.input)
    check_folders(source, Path(args.out_dir))
    device = cli.checked_device(args.device)

    def build() -> Predictor:
        checkpoint = load_checkpoint_file(args.checkpoint, args.trust_checkpoint)
        try:
            predictor = inference.build_predictor(
                cfg, checkpoint, args.checkpoint, device, args.score_thr, args.deploy
            )
        except ValueError as error:
            raise UsageError(f'{args.config}: {error}') from error
        if predictor.classes:
            with complete_file(Path(args.out_dir) / CLASSES) as file:
                file.write_text(json.dumps(list(predictor.classes)))
        print(f'{args.checkpoint}: loaded, predicting on {device}', file=sys.stderr)
        return predictor

    video = source.is_file() and source.name.lower().endswith(inference.VIDEO_SUFFIXES)
    try:
        (infer_video if video else infer_pictures)(build, source, args)
    except OSError as error:
        raise UsageError(str(error)) from error  # names the file
    return 0


if __name__ == '__main__':
    cli.run(main)

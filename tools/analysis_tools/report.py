# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Make one HTML page of a training: curves, metrics, predictions beside ground truth, classes, and commands.

The page needs no other file and no network. The best checkpoint in WORK_DIR, else the newest, predicts for the images.
"""

import argparse
import os
import shlex
import warnings
from contextlib import suppress
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

from mmlinglo.analysis.page import Training, predict, read_training, render
from mmlinglo.analysis.report import provenance
from mmlinglo.checkpoint import CheckpointError
from mmlinglo.hub import find_recipe
from mmlinglo.utils import cli, load_checkpoint_file
from mmlinglo.utils.cli import UsageError, run
from mmlinglo.utils.files import complete_file


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('work_dir', metavar='WORK_DIR', type=Path, help='work dir of a training by tools/train.py')
    add('--out', type=Path, help='the page; default: WORK_DIR/report.html')
    add('--num', type=int, default=6, help='validation images to show; default: %(default)s')
    text = 'validation images for the table of the classes, evenly spaced; default: %(default)s'
    add('--max-images', type=int, default=500, help=text)
    add('--score-thr', type=float, default=0.3, help='lowest score of drawn boxes; default: 0.3')
    add('--device', help='such as cpu or cuda:0; default: the first GPU, else cpu')
    cli.add_trust_argument(parser)
    return parser.parse_args(argv)


def find_checkpoint(work_dir: Path) -> Optional[Path]:
    """The newest of the best checkpoints, else the newest of the training."""
    best = list(work_dir.glob('best_*.pth'))
    others = [*work_dir.glob('epoch_*.pth'), *work_dir.glob('iter_*.pth')]
    return max(best or others, key=lambda path: (path.stat().st_mtime, path), default=None)


def predict_with(
    training: Training, checkpoint: Optional[Path], device: str, args: argparse.Namespace
) -> List[dict]:
    """Predictions for the page; where they cannot be had, none and a note."""
    try:
        if checkpoint is None or training.config is None:
            lost = 'checkpoint (best_*, epoch_*, iter_*)' if checkpoint is None else 'config (*.py)'
            raise UsageError(f'{str(args.work_dir)!r} has no {lost}: run this again with one')
        cfg = cli.load_config(str(training.config))
        cli.check_data_files(cfg, str(training.config), 'val')
        weights = load_checkpoint_file(str(checkpoint), args.trust_checkpoint)
        options = (device, args.num, args.max_images, args.score_thr)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # the training has shown them
            return predict(cfg, weights, str(checkpoint), *options)
    except Exception as error:  # any: the rest of the page is worth having
        known = isinstance(error, (UsageError, CheckpointError))
        reason = error if known else f'{type(error).__name__}: {error}'
        training.notes.append(f'No predictions and no table of the classes: {reason}')
        return []


def find_commands(training: Training, work_dir: Path, checkpoint: str) -> List[Tuple[str, str]]:
    """Titles and command lines of the training and a test."""
    config = work_dir / f'{training.name}.py'
    with suppress(ValueError):  # a config of the user's own
        config = Path(os.path.relpath(find_recipe(training.name).resolve()))
    processes = training.facts.get('processes')
    start = ['bash', 'tools/dist_train.sh'] if processes else ['python', 'tools/train.py']
    train = [*start, str(config), *([processes] if processes else []), '--work-dir', str(work_dir)]
    test = ['python', 'tools/test.py', str(config), checkpoint]
    test += ['--work-dir', str(work_dir / 'test')]
    return [('Training', shlex.join(train)), ('Test', shlex.join(test))]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Make the page.

    Raises:
        UsageError: If an argument is wrong, there is no log, or the page cannot be written.
    """
    args = parse_args(argv)
    if not args.work_dir.is_dir():
        raise UsageError(f'no folder {str(args.work_dir)!r}: give the work dir of a training')
    if args.num < 0 or args.max_images < 1:
        raise UsageError('--num must not be negative, and --max-images must be positive')
    device = cli.checked_device(args.device)
    try:
        training = read_training(args.work_dir)
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(str(error)) from error
    checkpoint = find_checkpoint(args.work_dir)
    found = predict_with(training, checkpoint, device, args)
    source = provenance(device)
    commands = find_commands(training, args.work_dir, str(checkpoint or 'CHECKPOINT'))
    commands.append((f'This page, on {source["date"]}', f'python {source["command"]}'))
    versions = dict(source['versions'], commit=source['commit'])
    page = render(training, commands, versions, found)
    out = args.out or args.work_dir / 'report.html'
    try:
        with complete_file(out) as file:
            file.write_text(page, encoding='utf-8')
    except OSError as error:
        raise UsageError(f'{str(out)!r} cannot be written: {error.strerror}') from error
    print(*training.notes, out, sep='\n')
    return 0


if __name__ == '__main__':
    run(main)

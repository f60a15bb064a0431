# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Draw the weights of key-only attention: one sheet per image, with a map for each stage, block and head.

The tool writes <image>_saliency.png to OUT_DIR. Bright positions have more weight. Each map has its own scale. The tool
reports images that it cannot read and processes the rest; the exit status is then 1. From Python, call
mmlinglo.analysis.saliency_maps.
"""

import argparse
import itertools
import os
import sys
from pathlib import Path
from typing import Dict, List, Optional

from mmlinglo.analysis import saliency_maps
from mmlinglo.analysis.saliency_figures import plot_saliency
from mmlinglo.utils import load_checkpoint_file, load_model_weights
from mmlinglo.utils.cli import (
    UsageError,
    add_trust_argument,
    checked_device,
    config_parser,
    load_config,
    run,
)
from mmlinglo.utils.deploy import build_model, switch_to_deploy
from mmlinglo.utils.inference import UnreadableError


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = config_parser(__doc__)
    add = parser.add_argument
    add('checkpoint', help='checkpoint file')
    add('images', nargs='+', metavar='image', help='image file')
    add('--out-dir', default='work_dirs/saliency', help='default: %(default)s')
    add('--stages', nargs='+', type=int, help='stages to draw, from 0; default: all')
    add('--blocks', nargs='+', type=int, help='blocks of each stage, from 0; default: all')
    add('--mean-heads', action='store_true', help='draw only the mean over the heads of each block')
    add('--device', help='such as cpu or cuda:0; default: the first GPU, else cpu')
    add('--deploy', action='store_true', help='re-parameterise the model before running it')
    add_trust_argument(parser)
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    cfg = load_config(args.config, args.cfg_options)
    device = checked_device(args.device)
    checkpoint = load_checkpoint_file(args.checkpoint, args.trust_checkpoint)
    model = build_model(cfg).eval()
    load_model_weights(model, checkpoint, args.checkpoint)
    if args.deploy:
        switch_to_deploy(model)
    model.to(device)

    damaged = 0
    for image, sheet in name_sheets(args.images, Path(args.out_dir)).items():
        try:
            maps = saliency_maps(model, image, cfg)
        except UnreadableError as error:
            print(f'skipped: {error}', file=sys.stderr)
            damaged += 1
            continue
        except ValueError as error:
            raise UsageError(f'{args.config}, {image}: {error}') from error
        title = f'{Path(image).name}, {Path(args.config).stem}'
        try:
            plot_saliency(maps, sheet, title, args.stages, args.blocks, args.mean_heads)
        except ValueError as error:
            raise UsageError(f'--stages, --blocks: {error}') from error
        print(f'written: {sheet}')
        for stage, reason in maps.skipped.items():
            print(f'  without stage {stage}: {reason}')
    if damaged:
        raise UsageError(f'{damaged} of {len(args.images)} images could not be read')
    return 0


def name_sheets(images: List[str], out_dir: Path) -> Dict[str, Path]:
    """Name the file to write for each image. No two are the same, and none is one of the images."""
    taken = {os.path.realpath(image) for image in images}
    sheets = {}
    for image in dict.fromkeys(images):
        for number in itertools.count(1):
            suffix = f'_{number}' if number > 1 else ''
            sheet = out_dir / f'{Path(image).stem}_saliency{suffix}.png'
            if os.path.realpath(sheet) not in taken:
                break
        taken.add(os.path.realpath(sheet))
        sheets[image] = sheet
    return sheets


if __name__ == '__main__':
    run(main)

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Put the images of a folder on one sheet, three in a row."""

import argparse
from pathlib import Path
from typing import List, Optional

import torch
from torchvision.io import ImageReadMode, read_image
from torchvision.transforms.functional import resize
from torchvision.utils import make_grid, save_image

from mmlinglo.utils.cli import UsageError, run


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', help='folder of .jpg and .png images')
    parser.add_argument('out', help='image to write')
    parser.add_argument('--size', type=int, default=320, help='height and width of each, in pixels')
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    paths = sorted(p for p in Path(args.folder).glob('*') if p.suffix in ('.jpg', '.png'))
    if not paths:
        raise UsageError(f'no .jpg or .png images in {args.folder!r}')
    pictures = [
        resize(read_image(str(path), ImageReadMode.RGB), [args.size, args.size], antialias=True)
        for path in paths
    ]
    sheet = make_grid(torch.stack(pictures) / 255, nrow=3, padding=8, pad_value=1.0)
    save_image(sheet, args.out)
    return 0


if __name__ == '__main__':
    run(main)

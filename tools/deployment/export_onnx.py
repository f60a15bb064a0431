# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Write the deployed form of a backbone or a classifier as an ONNX file.

The tool runs the file with ONNX Runtime on random images, and keeps it only if the outputs agree with PyTorch's.
Preprocessing is not part of the graph; the file's metadata holds its numbers.
"""

import argparse
from pathlib import Path
from typing import List, Optional, Tuple

import torch
from torch import Tensor, nn

import mmlinglo
from mmlinglo.utils import CheckpointError, load_checkpoint_file, load_model_weights
from mmlinglo.utils.cli import UsageError, add_trust_argument, config_parser, load_config, run
from mmlinglo.utils.deploy import (
    build_model,
    count_input_channels,
    stop_masking_padding,
    switch_to_deploy,
)
from mmlinglo.utils.export import (
    OPSETS,
    ExporterError,
    Logits,
    describe_preprocessing,
    export_onnx,
    relative_error,
    run_onnx,
)
from mmlinglo.utils.files import complete_file

TOLERANCE = 1e-4  # relative; float32 rounding gives about 1e-6
# In pixels. For dynamic sizes, no feature map of the example may have a side of 1.
SMALLEST = dict(fixed=32, dynamic=64)


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = config_parser(__doc__)
    parser.add_argument('checkpoint', nargs='?', help='checkpoint file; default: random weights')
    parser.add_argument('--out', required=True, help='file to write, *.onnx')
    parser.add_argument(
        '--part',
        choices=['backbone', 'model'],
        default='backbone',
        help='backbone (default): feature maps; model: logits of a classifier',
    )
    parser.add_argument(
        '--shape', nargs=2, type=int, default=[224, 224], metavar=('H', 'W'), help='image size'
    )
    parser.add_argument(
        '--batch-size', type=int, default=1, help='images per batch, without --dynamic; default: 1'
    )
    parser.add_argument(
        '--dynamic',
        action='store_true',
        help='allow any number and size of images; --shape is an example',
    )
    parser.add_argument(
        '--opset',
        type=int,
        choices=OPSETS,
        help="version of the ONNX operators; default: the exporter's own",
    )
    add_trust_argument(parser)
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f'{error.name} is missing: pip install onnx onnxscript onnxruntime'
        ) from error
    cfg = load_config(args.config, args.cfg_options)
    out = Path(args.out)
    if out.suffix != '.onnx' or out.is_dir():
        raise UsageError(f'--out must be a file *.onnx, got {args.out!r}')
    if args.part == 'model' and cfg.default_scope != 'mmpretrain':
        raise UsageError(
            f'--part model is for classifiers, but {args.config!r} belongs to {cfg.default_scope}: '
            'use --part backbone, or see docs/deployment.md for detectors and segmentors'
        )
    smallest = SMALLEST['dynamic' if args.dynamic else 'fixed']
    if min(args.shape) < smallest or args.batch_size < 1:
        raise UsageError(
            f'--shape must be at least {smallest} {smallest} and --batch-size at least 1, '
            f'got {args.shape} and {args.batch_size}'
        )

    model = build_model(cfg).eval()
    if args.checkpoint:
        checkpoint = load_checkpoint_file(args.checkpoint, args.trust_checkpoint)
        load_model_weights(model, checkpoint, args.checkpoint)
    stop_masking_padding(model)
    names = ['logits']
    if args.part == 'backbone':
        names = [f'stage{i}' for i in model.backbone.out_indices]
    part = model.backbone if args.part == 'backbone' else Logits(model).eval()
    channels = count_input_channels(model)
    batches = random_images(args.batch_size, channels, *args.shape, args.dynamic)
    with torch.no_grad():
        expected = [outputs_of(part, images) for images in batches]
        switch_to_deploy(model)
        metadata = dict(
            describe_preprocessing(cfg),
            config=Path(args.config).name,
            weights=Path(args.checkpoint).name if args.checkpoint else 'random',
            mmlinglo_version=mmlinglo.__version__,
        )
        with complete_file(out) as file:
            shape = tuple(batches[0].shape)
            try:
                export_onnx(part, file, shape, names, args.dynamic, args.opset, metadata)
            except ExporterError as error:
                raise UsageError(str(error)) from error
            errors = [relative_error(run_onnx(file, x), y) for x, y in zip(batches, expected)]
            if not max(errors) <= TOLERANCE:
                raise CheckpointError(
                    f'the ONNX file differs from PyTorch by {max(errors):.1e} of its largest '
                    f'output, more than {TOLERANCE:.0e}: nothing was written'
                )
    sizes = ' and '.join('x'.join(map(str, images.shape)) for images in batches)
    print(
        f'{out}: {args.part} with {metadata["weights"]} weights, outputs {", ".join(names)}; '
        f'on {sizes} they differ from PyTorch by {max(errors):.1e} (relative)'
    )
    return 0


def random_images(
    batch_size: int, channels: int, height: int, width: int, dynamic: bool
) -> List[Tensor]:
    """Make the batches to compare on. The first has the size to export; the second is for dynamic sizes."""
    if not dynamic:
        return [torch.randn(batch_size, channels, height, width)]
    return [
        torch.randn(2, channels, height, width),
        torch.randn(1, channels, height + 45, width - 23),
    ]


def outputs_of(module: nn.Module, images: Tensor) -> Tuple[Tensor, ...]:
    outputs = module(images)
    return outputs if isinstance(outputs, tuple) else (outputs,)


if __name__ == '__main__':
    run(main)

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Write the deployed form of a backbone or a classifier as an ONNX file.

The tool runs the file with ONNX Runtime on random images, and keeps it only if the outputs agree with PyTorch's.
Preprocessing is not part of the graph; the file's metadata holds its numbers.
"""

import argparse
from pathlib import Path
from typing import List, Optional

import torch

import mmlinglo
from mmlinglo.utils import CheckpointError, deploy, export, load_checkpoint_file, load_model_weights
from mmlinglo.utils.cli import UsageError, add_trust_argument, config_parser, load_config, run
from mmlinglo.utils.files import complete_file

TOLERANCE = 1e-4  # relative; float32 rounding gives about 1e-6


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = config_parser(__doc__)
    add = parser.add_argument
    add('checkpoint', nargs='?', help='checkpoint file; default: random weights')
    add('--out', required=True, help='file to write, *.onnx')
    text = 'backbone (default): feature maps; model: logits of a classifier'
    add('--part', choices=['backbone', 'model'], default='backbone', help=text)
    size = dict(nargs=2, type=int, default=[224, 224], metavar=('H', 'W'))
    add('--shape', **size, help='image size; default: 224 224')
    add('--batch-size', type=int, default=1, help='images per batch, without --dynamic; default: 1')
    text = 'allow any number and size of images; --shape is an example'
    add('--dynamic', action='store_true', help=text)
    text = "version of the ONNX operators; default: the exporter's own"
    add('--opset', type=int, choices=export.OPSETS, help=text)
    add_trust_argument(parser)
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        message = f'{error.name} is missing: pip install onnx onnxscript onnxruntime'
        raise UsageError(message) from error
    cfg = load_config(args.config, args.cfg_options)
    out = Path(args.out)
    if out.suffix != '.onnx' or out.is_dir():
        raise UsageError(f'--out must be a file *.onnx, got {args.out!r}')
    if args.part == 'model' and cfg.default_scope != 'mmpretrain':
        raise UsageError(
            f'--part model is for classifiers, but {args.config!r} belongs to {cfg.default_scope}: '
            'use --part backbone, or see docs/deployment.md for detectors and segmentors'
        )
    # For dynamic sizes, no feature map of the example may have a side of 1 pixel.
    smallest = 64 if args.dynamic else 32
    if min(args.shape) < smallest or args.batch_size < 1:
        raise UsageError(
            f'--shape must be at least {smallest} {smallest} and --batch-size at least 1, '
            f'got {args.shape} and {args.batch_size}'
        )

    model = deploy.build_model(cfg).eval()
    if args.checkpoint:
        checkpoint = load_checkpoint_file(args.checkpoint, args.trust_checkpoint)
        load_model_weights(model, checkpoint, args.checkpoint)
    deploy.stop_masking_padding(model)
    part, names = model, ['logits']  # what a classifier returns by default
    if args.part == 'backbone':
        part, names = model.backbone, [f'stage{i}' for i in model.backbone.out_indices]
    # The first batch has the size to export, the second one tests dynamic sizes.
    channels, (height, width) = deploy.count_input_channels(model), args.shape
    shapes = [(args.batch_size, channels, height, width)]
    if args.dynamic:
        shapes = [(2, channels, height, width), (1, channels, height + 45, width - 23)]
    batches = [torch.randn(shape) for shape in shapes]
    with torch.no_grad():
        expected = [part(images) for images in batches]
        if args.part == 'model':
            expected = [(logits,) for logits in expected]
        deploy.switch_to_deploy(model)
        metadata = dict(
            export.describe_preprocessing(cfg),
            config=Path(args.config).name,
            weights=Path(args.checkpoint).name if args.checkpoint else 'random',
            mmlinglo_version=mmlinglo.__version__,
        )
        with complete_file(out) as file:
            try:
                export.export_onnx(part, file, shapes[0], names, args.dynamic, args.opset, metadata)
            except export.ExporterError as error:
                raise UsageError(str(error)) from error
            outputs = [out for images in batches for out in export.run_onnx(file, images)]
            difference = export.relative_error(outputs, [out for maps in expected for out in maps])
            if not difference <= TOLERANCE:
                raise CheckpointError(
                    f'the ONNX file differs from PyTorch by {difference:.1e} of its largest '
                    f'output, more than {TOLERANCE:.0e}: nothing was written'
                )
    sizes = ' and '.join('x'.join(map(str, shape)) for shape in shapes)
    print(
        f'{out}: {args.part} with {metadata["weights"]} weights, outputs {", ".join(names)}; '
        f'on {sizes} they differ from PyTorch by {difference:.1e} (relative)'
    )
    return 0


if __name__ == '__main__':
    run(main)

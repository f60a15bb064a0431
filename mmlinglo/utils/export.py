# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Write networks as ONNX files, and compare their outputs with PyTorch's."""

import json
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple, Union

import torch
from mmengine.config import Config
from torch import Tensor, nn

DYNAMIC_SIZES = {0: 'batch', 2: 'height', 3: 'width'}
OPSETS = range(18, 24)  # PyTorch's exporter writes these; below 18, it silently writes another


class ExporterError(Exception):
    """PyTorch's exporter ignored one of the settings."""


def describe_preprocessing(cfg: Config) -> Dict[str, str]:
    """Describe how an experiment prepares its images, as metadata for an ONNX file.

    Args:
        cfg: The experiment's config.

    Returns:
        ``channel_order``, ``'RGB'`` or ``'BGR'``; ``mean`` and ``std``, JSON lists in that
        order, for ``(pixel - mean) / std`` with pixels from 0 to 255.
    """
    settings = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    channels = (cfg.model.get('backbone') or {}).get('in_channels', 3)
    rgb = settings.get('bgr_to_rgb', False) or settings.get('to_rgb', False)
    return dict(
        channel_order='RGB' if rgb else 'BGR',  # OpenMMLab reads files as BGR
        mean=json.dumps(list(settings.get('mean') or channels * [0.0])),
        std=json.dumps(list(settings.get('std') or channels * [1.0])),
    )


def export_onnx(
    model: nn.Module,
    path: Union[str, Path],
    image_shape: Tuple[int, int, int, int],
    output_names: Sequence[str],
    dynamic: bool = False,
    opset: Optional[int] = None,
    metadata: Optional[Dict[str, str]] = None,
) -> None:
    """Write a network as one ONNX file with PyTorch's exporter, which uses torch.export.

    Args:
        model: Network in evaluation mode from images to a tensor or a tuple.
        path: File to write.
        image_shape: Shape (B, C, H, W) of the input, which is named ``images``. If
            ``dynamic``, it is an example: B must be at least 2, and H and W large enough
            that no feature map has a side of 1 (above 32 for four stages).
        output_names: Names of the outputs.
        dynamic: Whether B, H and W are free.
        opset: Version of the ONNX operators, 18 to 23; None for the exporter's own.
        metadata: Texts to keep in the file.

    Raises:
        ValueError: If ``opset`` is out of range.
        ExporterError: If the exporter of this PyTorch cannot do it. The one of PyTorch 2.5
            fixes all sizes and always writes opset 18. No file is written.
    """
    if opset is not None and opset not in OPSETS:
        raise ValueError(f'opset must be in {OPSETS[0]}-{OPSETS[-1]} or None, got {opset}')
    program = torch.onnx.export(
        model,
        (torch.zeros(image_shape),),
        dynamo=True,
        input_names=['images'],
        output_names=list(output_names),
        dynamic_shapes=(DYNAMIC_SIZES,) if dynamic else None,
        opset_version=opset,
        verbose=False,
    )
    written = program.model.opset_imports['']
    if opset not in (None, written):
        raise ExporterError(
            f'the exporter of PyTorch {torch.__version__} writes opset {written} when asked for '
            f'{opset}: leave the opset out, or export with a later PyTorch'
        )
    if dynamic and any(
        isinstance(program.model.graph.inputs[0].shape[i], int) for i in DYNAMIC_SIZES
    ):
        raise ExporterError(
            f'the exporter of PyTorch {torch.__version__} fixes sizes that must stay free: export '
            'one file for each size, or export with a later PyTorch'
        )
    program.model.metadata_props.update(metadata or {})
    program.save(path, external_data=False)


def run_onnx(path: Union[str, Path], images: Tensor) -> List[Tensor]:
    """Run an ONNX file on a batch of images with ONNX Runtime on the CPU."""
    import onnxruntime  # needed here only

    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return [torch.from_numpy(out) for out in session.run(None, {'images': images.numpy()})]


def relative_error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Divide each tensor's largest error by its largest expected value; return the largest ratio.

    It is NaN if any of the tensors has NaN.

    Raises:
        ValueError: If the numbers or shapes of the tensors differ.
    """
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (outputs, expected)]
    if shapes[0] != shapes[1]:
        raise ValueError(f'the outputs have the shapes {shapes[0]}, expected {shapes[1]}')
    ratios = [
        float((out - ref).abs().max() / ref.abs().max().clamp(min=1e-12))
        for out, ref in zip(outputs, expected)
    ]
    return max(ratios, key=lambda ratio: (ratio != ratio, ratio))  # nan is the largest

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Detection without a compiler: a stand-in for ``mmcv._ext``, mmcv's compiled operators.

PyPI has mmcv as source code. Where it is installed without being compiled, there is no ``mmcv._ext``, and
``import mmcv.ops`` and ``import mmdet.models`` fail. This module offers the functions of ``mmcv._ext`` that
detectors commonly need, with the same arguments, computed by torchvision:

    nms, softnms, roi_align, roi_pool, deform_conv, modulated_deform_conv, sigmoid_focal_loss

They run on the CPU and on GPUs, have gradients, and respect strides (mmcv's own operators read channels-last
maps as if these were contiguous). Every other operator raises a RuntimeError that says how to compile it.

There are two ways to put it in place. Both leave compiled operators alone:

- ``import mmlinglo`` makes it the ``mmcv._ext`` of the process (:func:`register`).
- :func:`link` makes it the ``mmcv._ext`` of the environment, so that programs that do not import mmlinglo
  work too. ``tools/setup_env.sh`` calls it.

A link to this file is imported as a part of mmcv, so nothing here imports mmlinglo.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss


def find_ext() -> Optional[ModuleSpec]:
    """Find the installed ``mmcv._ext``, compiled or linked, without importing mmcv."""
    mmcv = importlib.util.find_spec('mmcv')
    if mmcv is None or mmcv.submodule_search_locations is None:
        return None
    return PathFinder.find_spec('mmcv._ext', mmcv.submodule_search_locations)


def is_compiled(ext: Optional[ModuleSpec]) -> bool:
    return ext is not None and str(ext.origin).endswith(tuple(EXTENSION_SUFFIXES))


def register() -> None:
    """Become the ``mmcv._ext`` of this process if none is installed."""
    if 'mmcv._ext' not in sys.modules and find_ext() is None:
        sys.modules['mmcv._ext'] = sys.modules[__name__]


def link() -> bool:
    """Become the ``mmcv._ext`` of this environment if no compiled one is installed.

    Python prefers a compiled ``_ext`` to the link beside it, so operators that are compiled later are used.
    The link is entered into mmcv's list of files: pip removes it together with mmcv.

    Returns:
        Whether the stand-in is now in use.

    Raises:
        ModuleNotFoundError: If mmcv is not installed.
    """
    mmcv = importlib.util.find_spec('mmcv')
    if mmcv is None or mmcv.origin is None:
        raise ModuleNotFoundError('mmcv is not installed')
    if is_compiled(find_ext()):
        return False
    path = Path(mmcv.origin).with_name('_ext.py')
    path.unlink(missing_ok=True)
    path.symlink_to(os.path.realpath(__file__))
    for record in path.parents[1].glob('*mmcv-*.dist-info/RECORD'):
        if '\nmmcv/_ext.py,' not in record.read_text():
            with record.open('a') as file:
                file.write('mmcv/_ext.py,,\n')
    return True


def compile_command() -> str:
    """Command that compiles the installed release of mmcv against the installed torch."""
    requirement = 'onedl-mmcv'
    for name in ('onedl-mmcv', 'mmcv'):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            requirement = f'{name}=={importlib.metadata.version(name)}'
            break
    return (
        "python -m pip install 'setuptools>=77.0.3,<80' wheel ninja psutil && python -m pip install "
        f'--force-reinstall --no-deps --no-cache-dir --no-build-isolation {requirement}'
    )


def __getattr__(name: str) -> Callable:  # mmcv asks for all of its operators on import
    if name.startswith('__'):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(
            f'{name} is not available: mmcv was installed without compiled operators, and torchvision has '
            f'no operator to compute it with. To compile it (this needs g++, and nvcc for GPUs), run '
            f'`bash tools/setup_env.sh --compile` in a checkout of mmlinglo, or: {compile_command()}'
        )

    return fail


def get_compiler_version() -> str:
    return 'not compiled, operators by torchvision'


get_compiling_cuda_version = get_compiler_version


# Names, arguments and in-place results from here on are those with which mmcv/ops/*.py call mmcv._ext.
# The backward passes are torchvision's own operators: with its public functions the forward pass would have
# to run again.


OPS = torch.ops.torchvision


def _widen(*tensors: Tensor) -> List[Tensor]:
    """Turn float16 and bfloat16 into float32: few digits for coordinates, and not supported on CPUs."""
    narrow = (torch.float16, torch.bfloat16)
    return [tensor.float() if tensor.dtype in narrow else tensor for tensor in tensors]


def _pick(options: Dict[str, Any], names: str) -> List[Any]:
    return [options[name] for name in names.split()]


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    boxes, scores = _widen(boxes, scores)
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    # mmcv compares with the threshold in float32: there an IoU of 0.6 does not exceed 0.6.
    threshold = torch.tensor(iou_threshold, dtype=torch.float32).item()
    # Sorted as mmcv sorts them, equal scores come in its order; torchvision's own sorting is stable.
    scores, order = scores.sort(0, descending=True)
    return order[OPS.nms(boxes[order], scores.to(boxes), threshold)]


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Keep the best box, lower the scores of those that overlap it, and so on with the rest.

    Args:
        dets: Receives boxes and scores in the order in which they were kept.
        method: What an overlap multiplies a score by: 0 if it reaches the threshold (0), 1 - IoU if it
            reaches the threshold (1), or exp(-IoU^2 / sigma) (2).
    """
    x1, y1, x2, y2 = boxes.unbind(1)
    areas = (x2 - x1 + offset) * (y2 - y1 + offset)
    scores = scores.clone()
    rest = torch.arange(len(boxes))
    kept: List[Tensor] = []
    while len(rest):
        # Equal scores are taken in mmcv's order: the best box changes places with the first one, ...
        best = int((scores[rest] == scores[rest].max()).nonzero()[0])
        rest[[0, best]] = rest[[best, 0]]
        first, rest = rest[0], rest[1:]
        kept.append(first)
        width = torch.minimum(x2[first], x2[rest]) - torch.maximum(x1[first], x1[rest]) + offset
        height = torch.minimum(y2[first], y2[rest]) - torch.maximum(y1[first], y1[rest]) + offset
        overlap = width.clamp(min=0) * height.clamp(min=0)
        iou = overlap / (areas[first] + areas[rest] - overlap)
        if method == 2:
            weight = torch.exp(-(iou * iou) / sigma)
        else:
            lower = 1 - iou if method == 1 else torch.zeros_like(iou)
            weight = torch.where(iou >= iou_threshold, lower, torch.ones_like(iou))
        scores[rest] *= weight
        # ... and the last ones fill the places of those that are dropped.
        keep = scores[rest] >= min_score
        count = int(keep.sum())
        rest, rest_of_keep = rest[:count].clone(), rest[count:][keep[count:]]
        rest[~keep[:count]] = rest_of_keep.flip(0)
    indices = torch.stack(kept) if kept else torch.zeros(0, dtype=torch.long)
    dets[: len(indices)] = torch.cat([boxes[indices], scores[indices, None]], 1)
    return indices


def roi_align_forward(
    input: Tensor, rois: Tensor, output: Tensor, *argmax: Tensor, pool_mode: int, **options: float
) -> None:
    if pool_mode != 1:
        __getattr__("roi_align with pool_mode='max'")()
    input, rois = _widen(input, rois)
    values = _pick(options, 'spatial_scale aligned_height aligned_width sampling_ratio aligned')
    output.copy_(OPS.roi_align(input, rois.to(input), *values))


def roi_align_backward(*tensors: Tensor, **options: float) -> None:
    grad_output, rois, _, _, grad_input = tensors
    grad, rois = _widen(grad_output, rois)
    size = _pick(options, 'spatial_scale aligned_height aligned_width')
    sampling = _pick(options, 'sampling_ratio aligned')
    grad_input.copy_(
        OPS._roi_align_backward(grad, rois.to(grad), *size, *grad_input.shape, *sampling)
    )


def _parts(start: Tensor, end: Tensor, number: int, size: int) -> List[Tensor]:
    """First and last pixel of the parts that mmcv's roi_pool divides regions into, along one side."""
    step = ((end - start) / number)[:, None]
    index = torch.arange(number).to(start)
    first = (index * step + start[:, None]).floor().clamp(0, size)
    last = ((index + 1) * step + start[:, None]).ceil().clamp(0, size) - 1
    empty = (last < first) | (end <= start)[:, None]
    return [edge.masked_fill(empty, size) for edge in (first, last)]  # outside: its maximum is 0


def _divide(rois: Tensor, map_size: torch.Size, height: int, width: int, scale: float) -> Tensor:
    """Turn each region into height x width regions, of one pixel or more each.

    torchvision rounds the corners of a region before it divides it, mmcv the edges of the parts. To get
    mmcv's result, each part is a region of its own for torchvision.
    """
    rois = _widen(rois)[0]
    x1, y1 = (rois[:, 1:3] * scale).unbind(1)
    x2, y2 = ((rois[:, 3:] + 1) * scale).unbind(1)
    left, right = (x[:, None].expand(-1, height, -1) for x in _parts(x1, x2, width, map_size[1]))
    top, bottom = (y[..., None].expand(-1, -1, width) for y in _parts(y1, y2, height, map_size[0]))
    image = rois[:, 0, None, None].expand_as(left)
    return torch.stack([image, left, top, right, bottom], -1).flatten(0, 2)


POOLED = 'pooled_height pooled_width spatial_scale'


def roi_pool_forward(
    input: Tensor, rois: Tensor, output: Tensor, argmax: Tensor, **options: Any
) -> None:
    parts = _divide(rois, input.shape[2:], *_pick(options, POOLED))
    input = _widen(input)[0]
    results = OPS.roi_pool(input, parts.to(input), 1, 1, 1)
    for target, result in zip((output, argmax), results):
        regions, channels, height, width = target.shape
        target.copy_(result.reshape(regions, height, width, channels).permute(0, 3, 1, 2))


def roi_pool_backward(
    grad_output: Tensor, rois: Tensor, argmax: Tensor, grad_input: Tensor, **options: Any
) -> None:
    parts = _divide(rois, grad_input.shape[2:], *_pick(options, POOLED))
    grad, where = (
        t.permute(0, 2, 3, 1).flatten(0, 2)[..., None, None].contiguous()
        for t in (_widen(grad_output)[0], argmax)
    )
    sizes = (1, 1, 1, *grad_input.shape)
    grad_input.copy_(OPS._roi_pool_backward(grad, parts.to(grad), where, *sizes))


def _deform_conv(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Optional[Tensor],
    bias: Optional[Tensor],
    geometry: List[int],
    grad_output: Optional[Tensor] = None,
) -> Any:
    """The output or, given its gradient, those of input, weight, offset, mask and bias.

    Args:
        geometry: Vertical and horizontal stride, padding and dilation, then groups and groups of offsets.
    """
    tensors = [
        input,
        weight,
        offset,
        offset.new_zeros(len(input), 1) if mask is None else mask,
        weight.new_zeros(len(weight)) if bias is None else bias,
    ]
    arguments = (*_widen(*tensors), *geometry, mask is not None)
    if grad_output is None:
        return OPS.deform_conv2d(*arguments)
    return OPS._deform_conv2d_backward(*_widen(grad_output), *arguments)


DEFORM = 'dH dW padH padW dilationH dilationW group deformable_group'
MODULATED = 'stride_h stride_w pad_h pad_w dilation_h dilation_w group deformable_group'


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, *buffers: Tensor, **geometry: int
) -> None:
    output.copy_(_deform_conv(input, weight, offset, None, None, _pick(geometry, DEFORM)))


def deform_conv_backward_input(*tensors: Tensor, **geometry: int) -> None:
    input, offset, grad_output, grad_input, grad_offset, weight, *_ = tensors
    numbers = _pick(geometry, DEFORM)
    grads = _deform_conv(input, weight, offset, None, None, numbers, grad_output)
    grad_input.copy_(grads[0])
    grad_offset.copy_(grads[2])


def deform_conv_backward_parameters(*tensors: Tensor, scale: float, **geometry: int) -> None:
    input, offset, grad_output, grad_weight, *_ = tensors
    numbers = _pick(geometry, DEFORM)
    weight = grad_weight  # only its shape matters
    grads = _deform_conv(input, weight, offset, None, None, numbers, grad_output)
    grad_weight.copy_(grads[1] * scale)


def modulated_deform_conv_forward(*tensors: Tensor, with_bias: bool, **geometry: int) -> None:
    input, weight, bias, _, offset, mask, output, _ = tensors
    numbers = _pick(geometry, MODULATED)
    output.copy_(_deform_conv(input, weight, offset, mask, bias if with_bias else None, numbers))


def modulated_deform_conv_backward(*tensors: Tensor, with_bias: bool, **geometry: int) -> None:
    input, weight, _, _, offset, mask, _ = tensors[:7]
    grad_input, grad_weight, grad_bias, grad_offset, grad_mask, grad_output = tensors[7:]
    numbers = _pick(geometry, MODULATED)
    grads = _deform_conv(input, weight, offset, mask, None, numbers, grad_output)
    targets = [grad_input, grad_weight, grad_offset, grad_mask]
    for target, grad in zip([*targets, grad_bias] if with_bias else targets, grads):
        target.copy_(grad)


def _sigmoid_focal_loss(
    input: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float
) -> Tensor:
    classes = torch.arange(input.size(1), device=input.device)
    loss = sigmoid_focal_loss(input, (target[:, None] == classes).to(input), alpha, gamma)
    if weight.numel():
        background = target >= len(weight)  # has weight 1; mmcv reads past the end of the weights
        loss = loss * weight[target.masked_fill(background, 0)].masked_fill(background, 1)[:, None]
    return loss


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    output.copy_(_sigmoid_focal_loss(_widen(input)[0], target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    with torch.enable_grad():
        logits = _widen(input.detach())[0].requires_grad_()
        loss = _sigmoid_focal_loss(logits, target, weight, gamma, alpha).sum()
        grad_input.copy_(torch.autograd.grad(loss, logits)[0])


register()

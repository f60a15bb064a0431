# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Work on a batch a few images at a time, so that what is in between stays in a CPU's cache."""

from typing import Callable, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**21  # of the widest map at a time; 8 MiB in float32


def image_chunks(x: Tensor) -> List[slice]:
    """Slices of the batch for a map (B, ...); all of it at once but on a CPU."""
    batch_size = x.shape[0]
    if x.device.type != 'cpu' or x.numel() == 0:
        return [slice(0, batch_size)]
    images = max(1, CHUNK_ELEMENTS * batch_size // x.numel())
    return [slice(start, start + images) for start in range(0, batch_size, images)]


class PendingGradient:
    """The gradient of a map from its reader, chunk by chunk, until what made the map adds that of its moments."""

    chunks: Optional[List[Tensor]] = None


def linear_by_images(
    function: Callable[..., Tensor],
    x: Tensor,
    *tensors: Tensor,
    weight: Tensor,
    bias: Tensor,
    pending: Optional[PendingGradient] = None,
) -> Tensor:
    """``F.linear(function(x, *tensors), weight, bias)`` in chunks of images, with only the arguments kept.

    The backward pass calls ``function`` again, chunk by chunk.

    Args:
        function: Treats each image by itself.
        x: Map, (B, ...).
        tensors: Further arguments, the same for all images.
        weight: Of the linear layer, (C', C).
        bias: Of the linear layer, (C',).
        pending: Where to leave the gradient of ``x`` for the backward pass of
            :func:`~.patch_moments.linear_patch_moments`, which made ``x`` and
            on whose moments one of ``tensors`` depends, so that it comes later.
            None to return it as usual.

    Returns:
        The result, (B, ..., C'), differentiable once.
    """
    return _LinearByImages.apply(function, pending, x, weight, bias, *tensors)


class _LinearByImages(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: ANN205
        ctx,  # noqa: ANN001
        function: Callable[..., Tensor],
        pending: Optional[PendingGradient],
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        *tensors: Tensor,
    ):
        ctx.function, ctx.pending = function, pending
        ctx.save_for_backward(x, weight, *tensors)
        return torch.cat(
            [F.linear(function(x[chunk], *tensors), weight, bias) for chunk in image_chunks(x)]
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:  # noqa: ANN001
        x, weight, *tensors = (tensor.detach() for tensor in ctx.saved_tensors)
        for tensor in tensors:
            tensor.requires_grad_()
        grads_x, grads = [], [torch.zeros_like(tensor) for tensor in (weight, *tensors)]
        for chunk in image_chunks(x):
            with torch.enable_grad():
                part = x[chunk].requires_grad_()
                out = ctx.function(part, *tensors)
            grad_out = grad[chunk]
            grad_x, *news = torch.autograd.grad(out, (part, *tensors), grad_out @ weight)
            grads_x.append(grad_x)
            grads[0].addmm_(grad_out.flatten(0, -2).t(), out.detach().flatten(0, -2))
            for total, new in zip(grads[1:], news):
                total += new
        grad_weight, *grads = grads
        grads = (grad_weight, grad.flatten(0, -2).sum(0), *grads)
        if ctx.pending is None:
            return None, None, torch.cat(grads_x), *grads
        ctx.pending.chunks = grads_x
        return None, None, None, *grads

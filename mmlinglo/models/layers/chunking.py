# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Work on a batch a few images at a time, so that what is in between stays in a CPU's cache."""

from typing import Callable, List, Optional, Tuple

import torch
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
    """The gradient of a map from one of its two readers, chunk by chunk, until the other one adds its own."""

    chunks: Optional[List[Tensor]] = None


def by_images(
    function: Callable[..., Tensor],
    x: Tensor,
    *tensors: Tensor,
    pending: Optional[PendingGradient] = None,
) -> Tensor:
    """``function(x, *tensors)`` in chunks of images, with nothing kept but the arguments.

    What the backward pass needs besides is computed again, chunk by chunk.

    Args:
        function: Treats each image by itself.
        x: Map, (B, ...).
        tensors: Further arguments, the same for all images.
        pending: Where to leave the gradient of ``x`` for the backward pass of
            something else that reads ``x`` and on which one of ``tensors``
            depends, so that it comes later. None to return it as usual.

    Returns:
        The result, (B, ...), differentiable once.
    """
    return _ByImages.apply(function, pending, x, *tensors)


class _ByImages(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: ANN205
        ctx,  # noqa: ANN001
        function: Callable[..., Tensor],
        pending: Optional[PendingGradient],
        x: Tensor,
        *tensors: Tensor,
    ):
        ctx.function, ctx.pending = function, pending
        ctx.save_for_backward(x, *tensors)
        return torch.cat([function(x[chunk], *tensors) for chunk in image_chunks(x)])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:  # noqa: ANN001
        x, *tensors = (tensor.detach() for tensor in ctx.saved_tensors)
        for tensor in tensors:
            tensor.requires_grad_()
        grads_x, totals = [], None
        for chunk in image_chunks(x):
            with torch.enable_grad():
                part = x[chunk].requires_grad_()
                out = ctx.function(part, *tensors)
            grad_x, *grads = torch.autograd.grad(out, (part, *tensors), grad[chunk])
            grads_x.append(grad_x)
            if totals is None:
                totals = grads
            else:
                for total, new in zip(totals, grads):
                    total += new
        if ctx.pending is None:
            return None, None, torch.cat(grads_x), *totals
        ctx.pending.chunks = grads_x
        return None, None, None, *totals

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .positional_encoding import ConditionalPositionalEncoding, update_running_statistics


class GroupedPositionalEncoding(ConditionalPositionalEncoding, plain=True):
    """The branches of an encoding as one convolution and one batch norm, in training.

    The convolution has a kernel of each branch for each channel, and the batch norm the statistics
    of each branch. Their sum over the branches is the output. It is what the branches compute, in
    fewer and larger operations; it keeps as much for the backward pass as they do.

    It was made for GPUs and has not been measured on one: no config uses it yet. Other norms than
    plain batch norms of equal settings run branch by branch. In evaluation it is its base class.
    """

    def rewrite(self, x: Tensor) -> Optional[Tensor]:
        if not self.training:
            return super().rewrite(x)
        if len(self.branches) == 1 or not self.is_linear or not self.uses_batch_statistics:
            return None
        convs, norms = zip(*self.branches)
        first, channels = norms[0], x.shape[1]
        if type(first) is not nn.BatchNorm2d:
            return None
        kernel = _Interleave.apply(*(conv.weight for conv in convs))
        out = F.conv2d(x, kernel, padding=1, groups=channels)
        weight = _Interleave.apply(*(norm.weight for norm in norms))
        bias = _Interleave.apply(*(norm.bias for norm in norms))
        mean, var = weight.detach().new_zeros(2, len(kernel))
        # With a momentum of 1 the running statistics are those of the batch.
        out = F.batch_norm(out, mean, var, weight, bias, True, 1.0, first.eps)
        mean, var = (each.view(channels, -1).t() for each in (mean, var))
        update_running_statistics(norms, mean, var)
        # Autocast would sum in, and return, float32 if no type were given.
        out = out.permute(0, 2, 3, 1).unflatten(3, (channels, -1)).sum(4, dtype=out.dtype)
        out = out.permute(0, 3, 1, 2)
        return x + out if self.skip else out


class _Interleave(torch.autograd.Function):
    """One tensor with the first entries of all, then the second ones, and so on.

    The gradient is copied once. That of stack() would be copied for each tensor, being strided.
    """

    @staticmethod
    def forward(*tensors: Tensor) -> Tensor:
        return torch.stack(tensors, dim=1).flatten(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Tensor, ...], _: Tensor) -> None:
        ctx.number = len(inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, ...]:
        return grad.unflatten(0, (-1, ctx.number)).transpose(0, 1).contiguous().unbind()

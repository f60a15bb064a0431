# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from typing import Any, Optional, Tuple, Union

import torch
import torch.distributed as dist
from torch import Tensor


def synchronize_statistics(
    mean: Tensor, var: Tensor, count: int, group: Optional[dist.ProcessGroup] = None
) -> Tuple[Tensor, Tensor, Union[int, Tensor]]:
    """Statistics over the inputs of all processes, differentiable, as SyncBatchNorm has them.

    Args:
        mean: Means in this process, of any shape.
        var: Biased variances, of the same shape.
        count: Values in this process that each is taken over; it may differ
            between processes.
        group: Processes; None for all.

    Returns:
        Mean, biased variance and number of values of all processes; the
        arguments themselves if there is no other process.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return mean, var, count
    counts = mean.new_full((1,), count)
    total = torch.cat([counts, (counts * mean).flatten()])
    total = _AllReduceSum.apply(total, group)
    overall = (total[1:] / total[0]).view_as(mean)
    # The variance around the overall mean, in a second exchange: a difference of squares would cancel.
    spread = counts * (var + (mean - overall).square())
    return overall, _AllReduceSum.apply(spread, group) / total[0], total[0].detach()


class _AllReduceSum(torch.autograd.Function):
    """Sum over the processes; the gradient of every process's loss reaches every addend."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Optional[dist.ProcessGroup]) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None

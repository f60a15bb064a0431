# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Moments of patches over the maps of all processes, for synchronized batch norms.

There is one exchange forward and one backward, whatever the number of branches.
"""

from typing import Any, Optional, Sequence, Tuple, Union

import torch
import torch.distributed as dist
from torch import Tensor

Group = Optional['dist.ProcessGroup']


def synchronize_moments(
    mean: Tensor, covariance: Tensor, count: int, group: Group = None
) -> Tuple[Tensor, Tensor, Union[int, Tensor]]:
    """Moments over the patches of all processes, differentiable.

    Args:
        mean: Of the patches in this process, (C, 9).
        covariance: Theirs, (C, 9, 9).
        count: Their number in each channel; it may differ between processes.
        group: Processes; None for all.

    Returns:
        Mean, covariance and number over all processes; the arguments themselves if there is no
        other process.
    """
    if is_alone(group):
        return mean, covariance, count
    return _Synchronize.apply(mean, covariance, count, group)


def is_alone(group: Group) -> bool:
    """Whether there is no other process."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1


def gather_moments(
    mean: Tensor, covariance: Tensor, count: int, group: Group
) -> Tuple[Tensor, Tensor, Tensor]:
    """As :func:`synchronize_moments`, without derivatives."""
    own = torch.cat([mean.flatten(), covariance.flatten(), mean.new_full((1,), count)])
    processes = own.new_empty(dist.get_world_size(group) * len(own))
    dist.all_gather_into_tensor(processes, own, group=group)
    sizes = [mean.numel(), covariance.numel(), 1]
    means, covariances, counts = processes.view(-1, len(own)).split(sizes, dim=1)
    total = counts.sum()
    shares = counts / total
    overall = (shares * means).sum(0).view_as(mean)
    # Around the overall mean: a difference of squares would cancel.
    shifts = means.view(-1, *mean.shape) - overall
    spread = covariances.view(-1, *covariance.shape) + shifts.unsqueeze(-1) * shifts.unsqueeze(-2)
    return overall, (shares.view(-1, 1, 1, 1) * spread).sum(0), total


def share_gradients(
    gradients: Sequence[Tensor], own_mean: Tensor, mean: Tensor, share: Tensor, group: Group
) -> Tuple[Tensor, Tensor]:
    """Gradients of this process's moments from those of the moments over all processes.

    Args:
        gradients: Of this process's loss, for the mean (C, 9) and the covariance (C, 9, 9).
        own_mean: Mean in this process, (C, 9).
        mean: Mean over all processes.
        share: Of all patches, those in this process.
        group: Processes; None for all.
    """
    both = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
    dist.all_reduce(both, group=group)
    grad_mean, grad_covariance = (share * both).split([9, 81], dim=1)
    grad_covariance = grad_covariance.unflatten(1, (9, 9))
    around = grad_covariance + grad_covariance.transpose(1, 2)
    shift = (own_mean - mean).unsqueeze(-1)
    return grad_mean + (around @ shift).squeeze(-1), grad_covariance


class _Synchronize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, covariance: Tensor, count: int, group: Group
    ) -> Tuple[Tensor, Tensor, Tensor]:
        found = gather_moments(mean, covariance, count, group)
        ctx.save_for_backward(mean, found[0], count / found[2])
        ctx.group = group
        ctx.mark_non_differentiable(found[2])
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_mean: Tensor, grad_covariance: Tensor, _: Tensor
    ) -> Tuple[Tensor, Tensor, None, None]:
        own_mean, mean, share = ctx.saved_tensors
        gradients = grad_mean, grad_covariance
        return *share_gradients(gradients, own_mean, mean, share, ctx.group), None, None

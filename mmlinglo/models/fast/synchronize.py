# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from typing import Optional, Tuple, Union

import torch
import torch.distributed as dist
from torch import Tensor


def synchronize_statistics(
    mean: Tensor, var: Tensor, count: int, group: Optional[dist.ProcessGroup] = None
) -> Tuple[Tensor, Tensor, Union[int, Tensor]]:
    """Statistics over the inputs of all processes, differentiable, as SyncBatchNorm has them.

    There is one exchange forward and one backward.

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
    from torch.distributed.nn.functional import all_gather  # not in every build of PyTorch

    own = torch.cat([mean.flatten(), var.flatten(), mean.new_full((1,), count)])
    processes = torch.stack(all_gather(own, dist.group.WORLD if group is None else group))
    means, variances, counts = processes.split([mean.numel(), mean.numel(), 1], dim=1)
    total = counts.sum().detach()
    shares = counts / total
    overall = (shares * means).sum(0)
    # Around the overall mean: a difference of squares would cancel.
    spread = (shares * (variances + (means - overall).square())).sum(0)
    return overall.view_as(mean), spread.view_as(mean), total

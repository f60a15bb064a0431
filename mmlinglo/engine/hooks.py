# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from typing import Optional

from mmengine.dist import all_reduce_params
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmlinglo.registry import HOOKS


@HOOKS.register_module()
class AverageBuffersHook(Hook):
    """Average floating-point buffers, such as batch-norm statistics, over the processes.

    For processes without GPUs, where torch's SyncBatchNorm does not work. It
    acts after every training iteration, unlike mmengine's ``SyncBuffersHook``,
    so that a checkpoint of an iteration-based schedule, which only rank 0
    writes, holds the statistics of all ranks. The buffers of LinGlo-b0 are
    0.5 MB, a thirtieth of its gradients.
    """

    priority = 'NORMAL'  # before the checkpoint hook

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,  # noqa: ARG002
        data_batch: Optional[dict] = None,  # noqa: ARG002
        outputs: Optional[dict] = None,  # noqa: ARG002
    ) -> None:
        """Average the buffers."""
        buffers = [b for b in runner.model.buffers() if b.is_floating_point()]
        all_reduce_params(buffers, op='mean')

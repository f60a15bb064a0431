# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import torch
from mmengine.config import Config


def prepare_cpu_distributed(cfg: Config) -> None:
    """Let mmengine's Runner train in several processes without GPUs.

    Three things stand in its way: it initialises NCCL unless a process group
    exists, it gives DistributedDataParallel a GPU number, and torch's
    SyncBatchNorm refuses CPU tensors. Call this in each process that torchrun
    started, before the Runner is built.

    Args:
        cfg: The config, changed in place: ``model_wrapper_cfg`` and
            ``custom_hooks`` are extended, ``sync_bn`` is removed.
    """
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')
    cfg.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=False,  # mmengine's default
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    cfg.pop('sync_bn', None)
    cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='mmlinglo.AverageBuffersHook')]

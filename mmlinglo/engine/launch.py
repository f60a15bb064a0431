# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import ctypes
import os
import signal
import sys
from datetime import timedelta

import torch
from mmengine.config import Config


def prepare_cpu_distributed(cfg: Config) -> None:
    """Let mmengine's Runner train in several processes without GPUs.

    By default, the Runner initializes NCCL, gives DistributedDataParallel a GPU number, and may
    use SyncBatchNorm, which refuses CPU tensors. This function changes all three. Call it in
    each process that torchrun started, before you build the Runner.

    Args:
        cfg: The config, changed in place. The function sets ``model_wrapper_cfg``, adds to
            ``custom_hooks``, and removes ``sync_bn``. It reads the timeout in seconds from
            ``env_cfg.dist_cfg``, as mmengine does for NCCL.
    """
    if not torch.distributed.is_initialized():
        seconds = cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout', 1800)
        torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=seconds))
    cfg.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=False,  # mmengine's default
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    cfg.pop('sync_bn', None)
    cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='mmlinglo.AverageBuffersHook')]


def end_with_torchrun() -> None:
    """End this process when the torchrun that started it ends.

    If SIGKILL ends torchrun, it cannot stop its processes. They would train on, next to the job
    that you resume in the same folder. Without torchrun, or on another system than Linux, this
    function does nothing.
    """
    if 'TORCHELASTIC_RUN_ID' in os.environ and sys.platform == 'linux':
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)

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

    Three things stand in its way: it initialises NCCL unless a process group
    exists, it gives DistributedDataParallel a GPU number, and torch's
    SyncBatchNorm refuses CPU tensors. Call this in each process that torchrun
    started, before the Runner is built.

    Args:
        cfg: The config, changed in place: ``model_wrapper_cfg`` and
            ``custom_hooks`` are extended, ``sync_bn`` is removed. From
            ``env_cfg.dist_cfg`` the ``timeout`` in seconds is taken, as
            mmengine does for NCCL.
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
    """Let this process end when the torchrun that started it is killed.

    torchrun ends its processes when it can. If it is killed by SIGKILL they
    would train on, beside the job that is resumed in the same folder. Does
    nothing without torchrun, or on another system than Linux.
    """
    if 'TORCHELASTIC_RUN_ID' in os.environ and sys.platform == 'linux':
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)

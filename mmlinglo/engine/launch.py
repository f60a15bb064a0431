# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import ctypes
import os
import signal
import sys
from contextlib import contextmanager
from datetime import timedelta
from typing import Iterator

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
        with hide_native_output(1, 2):  # gloo tells of each connection
            torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=seconds))
    cfg.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=False,  # mmengine's default
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    cfg.pop('sync_bn', None)
    # First, so that hooks of the same priority, such as EMAHook, see the averages.
    cfg.custom_hooks = [dict(type='mmlinglo.AverageBuffersHook'), *cfg.get('custom_hooks', [])]


@contextmanager
def hide_native_output(*descriptors: int) -> Iterator[None]:
    """Hide what C++ code and other programs write.

    Args:
        descriptors: 1 for the standard output of this process, 2 for its standard error.
    """
    kept = {descriptor: os.dup(descriptor) for descriptor in descriptors}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for descriptor in descriptors:
            os.dup2(nowhere, descriptor)
        yield
    finally:
        for descriptor, copy in kept.items():
            os.dup2(copy, descriptor)
            os.close(copy)
        os.close(nowhere)


def end_with_torchrun() -> None:
    """End this process when the torchrun that started it ends.

    If SIGKILL ends torchrun, it cannot stop its processes. They would train on, next to the job
    that you resume in the same folder. Without torchrun, or on another system than Linux, this
    function does nothing.
    """
    if 'TORCHELASTIC_RUN_ID' in os.environ and sys.platform == 'linux':
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)

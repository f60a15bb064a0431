# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Processes without GPUs, and what ends them."""

import ctypes
import os
import signal
import socket
import sys

import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from torch import nn

from mmlinglo.engine import AverageBuffersHook, end_with_torchrun, prepare_cpu_distributed
from mmlinglo.engine.launch import hide_native_output


class Runner:
    def __init__(self, model):
        self.model = model


def worker(rank, port, out):
    for name, value in dict(
        MASTER_ADDR='127.0.0.1', MASTER_PORT=port, WORLD_SIZE=2, RANK=rank, LOCAL_RANK=rank
    ).items():
        os.environ[name] = str(value)
    cfg = Config(
        dict(
            env_cfg=dict(dist_cfg=dict(timeout=60)),
            sync_bn='torch',
            find_unused_parameters=True,
            custom_hooks=[dict(type='EMAHook')],
        )
    )
    prepare_cpu_distributed(cfg)
    prepare_cpu_distributed(Config(dict()))  # the process group is there: used as it is
    norm = nn.BatchNorm2d(2)
    norm.running_mean.fill_(10.0 * rank)
    norm.num_batches_tracked.fill_(rank)
    AverageBuffersHook().after_train_iter(Runner(norm), 0)
    torch.save(
        dict(
            cfg=cfg.to_dict(),
            backend=dist.get_backend(),
            world_size=dist.get_world_size(),
            mean=norm.running_mean,
            tracked=norm.num_batches_tracked,
        ),
        f'{out}/{rank}.pth',
    )
    os._exit(0)  # gloo of torch 2.5 may hang where the group is destroyed


def test_two_processes_without_gpus(tmp_path):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, str(tmp_path)), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f'{rank}.pth')
        assert (found['backend'], found['world_size']) == ('gloo', 2)
        assert 'sync_bn' not in found['cfg']
        wrapper = found['cfg']['model_wrapper_cfg']
        assert wrapper['type'] == 'MMDistributedDataParallel'
        assert wrapper['device_ids'] is None
        assert wrapper['find_unused_parameters'] is True
        hooks = [hook['type'] for hook in found['cfg']['custom_hooks']]
        assert hooks == ['mmlinglo.AverageBuffersHook', 'EMAHook']
        assert found['mean'].tolist() == [5.0, 5.0]
        assert found['tracked'] == rank  # counters are no averages


@pytest.mark.skipif(sys.platform != 'linux', reason='Linux only')
@pytest.mark.parametrize('started_by_torchrun', [False, True])
def test_the_kernel_is_asked_to_end_processes_of_torchrun(monkeypatch, started_by_torchrun):
    set_signal, get_signal = 1, 2  # PR_SET_PDEATHSIG and PR_GET_PDEATHSIG of linux/prctl.h
    prctl = ctypes.CDLL(None).prctl
    monkeypatch.delenv('TORCHELASTIC_RUN_ID', raising=False)
    if started_by_torchrun:
        monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'any')
    try:
        end_with_torchrun()
        found = ctypes.c_int()
        prctl(get_signal, ctypes.byref(found))
    finally:
        prctl(set_signal, 0)
    assert found.value == (signal.SIGKILL if started_by_torchrun else 0)


def test_output_of_other_programs_is_hidden(capfd):
    with hide_native_output(2):
        os.system('echo shown; echo hidden >&2')
    with hide_native_output(1, 2):
        os.system('echo hidden; echo hidden >&2')
    with pytest.raises(ValueError, match='inside'), hide_native_output(1, 2):
        raise ValueError('inside')
    os.system('echo error >&2')
    assert tuple(capfd.readouterr()) == ('shown\n', 'error\n')

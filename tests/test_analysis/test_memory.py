# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import os
import signal

import pytest
import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from mmlinglo.analysis.memory import (
    OutOfMemoryError,
    call_in_fresh_process,
    is_out_of_memory,
    measure_first_step,
)

MIB = 2**20


def build(kept, dropped, step, device='cpu'):
    """Sizes in MiB of what is kept and dropped while building, and made in the step."""
    torch.ones(dropped * MIB, dtype=torch.uint8, device=device)
    weights = torch.ones(kept * MIB, dtype=torch.uint8, device=device)

    def run():
        # Three times, each freed: the peak holds one.
        for _ in range(3):
            torch.ones(step * MIB, dtype=torch.uint8, device=device).add_(weights[0])

    return run


def measured_peaks(device):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    peaks = {
        sizes: measure_first_step(lambda sizes=sizes: build(*sizes, device), device)
        for sizes in [(1, 1, 1), (8, 100, 40), (40, 0, 8), (8, 0, 200)]
    }
    return peaks, threads


def die(status):
    if status < 0:
        os.kill(os.getpid(), -status)
    os._exit(status)


def allocate(size):
    return len(torch.empty(size, dtype=torch.uint8))


@pytest.mark.parametrize(
    'device',
    [
        'cpu',
        pytest.param(
            'cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
        ),
    ],
)
def test_peak_is_what_lives_at_once(device, monkeypatch):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 3)
    peaks, threads = call_in_fresh_process(measured_peaks, device)
    assert threads == 3
    for (kept, _, step), (peak, seconds) in peaks.items():
        assert peak == pytest.approx(kept + step, abs=1.5)
        assert seconds > 0


def test_errors_come_back():
    with pytest.raises(ProcessRaisedException, match=r'Traceback[\s\S]*negative dimension'):
        call_in_fresh_process(allocate, -1)
    with pytest.raises(OutOfMemoryError, match='allocate'):
        call_in_fresh_process(allocate, 2**60)


@pytest.mark.slow
def test_process_that_dies():
    with pytest.raises(OutOfMemoryError, match='SIGKILL'):
        call_in_fresh_process(die, -signal.SIGKILL)
    with pytest.raises(ProcessExitedException, match='SIGSEGV'):
        call_in_fresh_process(die, -signal.SIGSEGV)
    with pytest.raises(ProcessExitedException, match='exit code 3') as caught:
        call_in_fresh_process(die, 3)
    assert caught.value.exit_code == 3


def test_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.cuda.OutOfMemoryError('CUDA out of memory'))
    assert not is_out_of_memory(ValueError('DefaultCPUAllocator'))

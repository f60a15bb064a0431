# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Peak memory of a computation, measured in a process of its own."""

import ctypes
import gc
import re
import resource
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Callable, Optional, Tuple, Union

import torch
from torch.multiprocessing import ProcessExitedException, get_context, spawn
from torch.utils.benchmark import timer

MIB = 2**20
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h: larger blocks are mappings of their own
Device = Union[str, torch.device]


class OutOfMemoryError(Exception):
    """A computation needed more memory than there is, or than it was allowed."""


def call_in_fresh_process(
    function: Callable[..., Any], *args: Any, threads: Optional[int] = None
) -> Any:
    """Call a function in a new Python process and return its result.

    Args:
        function: A function of a module, so that it can be pickled.
        args: Its arguments; they and the result must be picklable.
        threads: CPU threads; None for PyTorch's default.

    Raises:
        OutOfMemoryError: If an allocation failed, or the system killed the process, as Linux does when
            memory runs out.
        torch.multiprocessing.ProcessExitedException: If the process died otherwise.
        torch.multiprocessing.ProcessRaisedException: If the function raised something else; the message has
            its traceback.
    """
    receiver, sender = get_context('spawn').Pipe(duplex=False)
    try:
        spawn(_send_result, (sender, threads, function, args))
    except ProcessExitedException as error:
        if error.signal_name == 'SIGKILL':
            raise OutOfMemoryError(str(error)) from error
        raise
    sender.close()
    result, refused = receiver.recv()
    if refused:
        raise OutOfMemoryError(refused)
    return result


def _send_result(
    _: int, sender: Connection, threads: Optional[int], function: Callable[..., Any], args: tuple
) -> None:
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.zeros(2**24).add_(1)  # starts all of them: their stacks are not the function's memory
    try:
        sender.send((function(*args), ''))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        sender.send((None, str(error) or 'out of memory'))


def measure_first_step(
    build: Callable[[], Callable[[], object]], device: Device, limit_gib: Optional[float] = None
) -> Tuple[float, float]:
    """Measure a model's first step: weights, inputs and all that the step makes.

    Its peak memory is the level's peak during ``build()()`` over the level before ``build``, but for what
    ``build`` itself makes and drops. On a GPU the level is what torch's allocator has handed out. On a
    CPU it is the resident size of the process, VmRSS of ``/proc/self/status``, and its peak VmHWM, which
    is reset to VmRSS after ``build``. (``ru_maxrss`` cannot be reset.) malloc is told to return what is
    freed at once; otherwise the same step measures up to 40 % more in one run than in another.

    Call this in a fresh process (:func:`call_in_fresh_process`), after a small step that loads the
    libraries, which are not the model's.

    Args:
        build: Makes everything that the step needs and returns the step.
        device: Where the work is done.
        limit_gib: Memory that this process may take, from now on, beyond the level before ``build``; None for
            no limit.

    Returns:
        Peak memory in MiB, and the time of the step in seconds.

    Raises:
        OutOfMemoryError: If the step needs more memory than there is or is allowed.
        OSError: On a CPU without Linux's ``/proc``.
    """
    device = torch.device(device)
    on_gpu = device.type == 'cuda'
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 * 1024)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = torch.cuda.memory_allocated(device) if on_gpu else _read_status('VmRSS')
    try:
        if limit_gib is not None:
            limit_memory(limit_gib, device)
        step = build()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path('/proc/self/clear_refs').write_text('5')  # resets VmHWM, see proc(5)
        start = timer()  # waits for the device
        step()
        seconds = timer() - start
    except Exception as error:
        # oneDNN, refused an allocation at the limit, says only this.
        refused = limit_gib is not None and 'could not create a primitive' in str(error)
        if refused or is_out_of_memory(error):
            raise OutOfMemoryError(str(error)) from error
        raise
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else _read_status('VmHWM')
    return (peak - before) / MIB, seconds


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory could not be had, on a GPU or a CPU."""
    if isinstance(error, (OutOfMemoryError, MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    # Neither torch's CPU allocator nor C++'s nor oneDNN's has an exception of its own.
    message = 'DefaultCPUAllocator|bad_alloc|could not create a memory'
    return isinstance(error, RuntimeError) and re.search(message, str(error)) is not None


def limit_memory(limit_gib: float, device: torch.device) -> None:
    """Let allocations fail, from now on, beyond ``limit_gib`` GiB more than this process has now.

    On a CPU this limits the private memory of the process (``RLIMIT_DATA``), on a GPU torch's allocator.
    """
    if device.type == 'cuda':
        total = torch.cuda.get_device_properties(device).total_memory
        limit = torch.cuda.memory_reserved(device) + limit_gib * 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    else:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        soft = _read_status('VmData') + int(limit_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _read_status(name: str) -> int:
    """An entry, such as ``VmRSS:  1234 kB``, of this process's status, in bytes."""
    status = Path('/proc/self/status').read_text()
    return 1024 * int(re.findall(rf'^{name}:\s+(\d+) kB', status, re.MULTILINE)[0])

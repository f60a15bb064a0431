# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Peak memory of a computation, measured in a process of its own."""

import ctypes
import gc
import re
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Callable, Tuple, Union

import torch
from torch.multiprocessing import ProcessExitedException, get_context, spawn
from torch.utils.benchmark import timer

MIB = 2**20
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h: larger blocks are mappings of their own


class OutOfMemoryError(Exception):
    """A computation needed more memory than there is."""


def call_in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a new Python process, with as many CPU threads, and return its result.

    Args:
        function: A function of a module, so that it can be pickled.
        args: Its arguments; they and the result must be picklable.

    Raises:
        OutOfMemoryError: If an allocation failed, or the system killed the process, as Linux does when
            memory runs out.
        torch.multiprocessing.ProcessExitedException: If the process died otherwise.
        torch.multiprocessing.ProcessRaisedException: If the function raised something else; the message has
            its traceback.
    """
    receiver, sender = get_context('spawn').Pipe(duplex=False)
    try:
        spawn(_send_result, (sender, torch.get_num_threads(), function, args))
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
    _: int, sender: Connection, threads: int, function: Callable[..., Any], args: tuple
) -> None:
    torch.set_num_threads(threads)
    torch.zeros(2**24).add_(1)  # starts all of them: their stacks are not the function's memory
    try:
        sender.send((function(*args), ''))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        sender.send((None, str(error) or 'out of memory'))


def measure_first_step(
    build: Callable[[], Callable[[], object]], device: Union[str, torch.device]
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

    Returns:
        Peak memory in MiB, and the time of the step in seconds.

    Raises:
        OSError: On a CPU without Linux's ``/proc``.
    """
    device = torch.device(device)
    on_gpu = device.type == 'cuda'
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 * 1024)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = torch.cuda.memory_allocated(device) if on_gpu else _read_status('VmRSS')
    step = build()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path('/proc/self/clear_refs').write_text('5')  # resets VmHWM, see proc(5)
    start = timer()  # waits for the device
    step()
    seconds = timer() - start
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else _read_status('VmHWM')
    return (peak - before) / MIB, seconds


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory could not be had, on a GPU or a CPU."""
    if isinstance(error, (OutOfMemoryError, MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    # Neither torch's CPU allocator nor C++'s nor oneDNN's has an exception of its own.
    message = 'DefaultCPUAllocator|bad_alloc|could not create a memory'
    return isinstance(error, RuntimeError) and re.search(message, str(error)) is not None


def _read_status(name: str) -> int:
    """An entry, such as ``VmRSS:  1234 kB``, of this process's status, in bytes."""
    status = Path('/proc/self/status').read_text()
    return 1024 * int(re.findall(rf'^{name}:\s+(\d+) kB', status, re.MULTILINE)[0])

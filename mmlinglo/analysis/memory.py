# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Peak memory of a computation, measured in a process of its own."""

import ctypes
import gc
import multiprocessing
import re
import resource
import signal
import traceback
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, Union

import torch
from torch.utils.benchmark import timer

MIB = 2**20
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h: larger blocks are mappings of their own
Device = Union[str, torch.device]


class OutOfMemoryError(Exception):
    """A computation needed more memory than there is, or than it was allowed."""


class ProcessDiedError(RuntimeError):
    """A process ended without a result.

    Args:
        exitcode: Its exit status; minus the signal's number if one killed it.
    """

    def __init__(self, exitcode: int) -> None:
        super().__init__(f'the process ended without a result, with status {exitcode}')
        self.exitcode = exitcode


def call_in_fresh_process(function: Callable[..., Any], *args: Any, limited: bool = False) -> Any:
    """Call a function in a new Python process and return its result.

    Args:
        function: A function of a module, so that it can be pickled.
        args: Its arguments; they and the result must be picklable.
        limited: Whether the function limits its memory. Libraries that do not check their allocations
            crash at the limit, which then counts as out of memory.

    Raises:
        OutOfMemoryError: If an allocation failed, or the system killed the process, as Linux does when
            memory runs out.
        ProcessDiedError: If the process died otherwise.
        RuntimeError: If the function raised something else; the message is its traceback.
    """
    context = multiprocessing.get_context('spawn')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, function, args), daemon=True)
    process.start()
    sender.close()
    try:
        result, error, message = receiver.recv()
    except EOFError:
        process.join()
        crashes = (signal.SIGSEGV, signal.SIGABRT) if limited else ()
        if -process.exitcode in (signal.SIGKILL, *crashes):
            raise OutOfMemoryError(f'the process died with status {process.exitcode}') from None
        raise ProcessDiedError(process.exitcode) from None
    process.join()
    if error is not None:
        raise error(message)
    return result


def _send_result(sender: Connection, function: Callable[..., Any], args: tuple) -> None:
    try:
        outcome = (function(*args), None, '')
    except Exception as error:
        if is_out_of_memory(error):
            outcome = (None, OutOfMemoryError, str(error))
        else:
            outcome = (None, RuntimeError, traceback.format_exc())
    sender.send(outcome)


def peak_memory_mib(
    build: Callable[[], Callable[[], object]], device: Device, limit_gib: Optional[float] = None
) -> float:
    """Peak memory, in MiB, of a model's first step: weights, inputs and all that the step makes.

    The measure is the level's peak during ``build()()`` over the level before ``build``, but for what
    ``build`` itself makes and drops. On a GPU the level is what torch's allocator has handed out. On a
    CPU it is the resident size of the process, VmRSS of ``/proc/self/status``, and its peak VmHWM, which
    is reset to VmRSS after ``build``. (``ru_maxrss`` cannot be reset.) malloc is told to return what is
    freed at once; otherwise the same step measures up to 40 % more in one run than in another.

    Call this in a fresh process (:func:`call_in_fresh_process`), after a small step that loads the
    libraries and starts the threads, which are not the model's.

    Args:
        build: Makes everything that the step needs and returns the step.
        device: Where the work is done.
        limit_gib: Memory that may be taken beyond the level before ``build``; None for no limit.

    Raises:
        OutOfMemoryError: If the step needs more memory than there is or is allowed.
        OSError: On a CPU without Linux's ``/proc``.
    """
    device = torch.device(device)
    on_gpu = device.type == 'cuda'
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 * 1024)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = torch.cuda.memory_allocated(device) if on_gpu else _status_bytes('VmRSS')
    try:
        with memory_limit(limit_gib, device):
            step = build()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
            else:
                ctypes.CDLL(None).malloc_trim(0)
                Path('/proc/self/clear_refs').write_text('5')  # resets VmHWM, see proc(5)
            step()
            timer()  # waits for the device
    except Exception as error:
        # oneDNN, refused an allocation at the limit, says only this.
        refused = limit_gib is not None and 'could not create a primitive' in str(error)
        if refused or is_out_of_memory(error):
            raise OutOfMemoryError(str(error)) from error
        raise
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else _status_bytes('VmHWM')
    return (peak - before) / MIB


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory could not be had, on a GPU or a CPU."""
    if isinstance(error, (OutOfMemoryError, MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    # Neither torch's CPU allocator nor C++'s nor oneDNN's has an exception of its own.
    message = 'DefaultCPUAllocator|bad_alloc|could not create a memory'
    return isinstance(error, RuntimeError) and re.search(message, str(error)) is not None


@contextmanager
def memory_limit(limit_gib: Optional[float], device: Device) -> Iterator[None]:
    """Let allocations fail beyond ``limit_gib`` GiB more than this process has now.

    On a CPU this limits the private memory of the process (``RLIMIT_DATA``), on a GPU torch's allocator.
    """
    device = torch.device(device)
    if limit_gib is None:
        yield
    elif device.type == 'cuda':
        total = torch.cuda.get_device_properties(device).total_memory
        limit = torch.cuda.memory_reserved(device) + limit_gib * 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    else:
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = _status_bytes('VmData') + int(limit_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _status_bytes(name: str) -> int:
    """An entry, such as ``VmRSS:  1234 kB``, of this process's status, in bytes."""
    status = Path('/proc/self/status').read_text()
    return int(re.search(rf'^{name}:\s+(\d+) kB', status, re.MULTILINE).group(1)) * 1024

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""How a measured model is executed, and measurements in processes that may run out of memory."""

import signal
from dataclasses import dataclass
from typing import Any, Callable, Optional

import torch

from mmlinglo.analysis.memory import OutOfMemoryError, ProcessDiedError, call_in_fresh_process


@dataclass(frozen=True)
class Execution:
    """How a model is executed.

    Args:
        batch_size: Images in a batch.
        device: Device of the measurement.
        dtype: Data type of weights and images.
        threads: CPU threads; None for PyTorch's default.
        train_step: Whether to measure forward and backward of the training form,
            rather than the forward of an inference form.

    Raises:
        ValueError: If ``batch_size`` or ``threads`` is below 1, or there is no GPU.
    """

    batch_size: int = 1
    device: str = 'cpu'
    dtype: torch.dtype = torch.float32
    threads: Optional[int] = None
    train_step: bool = False

    def __post_init__(self) -> None:
        for name, value in (('batch size', self.batch_size), ('threads', self.threads)):
            if value is not None and value < 1:
                raise ValueError(f'{name} must be at least 1, got {value}')
        if torch.device(self.device).type == 'cuda' and not torch.cuda.is_available():
            raise ValueError(f'device {self.device!r}: PyTorch finds no GPU here, use a CPU')

    def prepare_process(self) -> None:
        """Set the number of threads and start them; their stacks are not the model's memory."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        torch.zeros(2**24).add_(1)  # long enough for all of them


def result_or_out_of_memory(
    function: Callable[..., Any], *args: Any, limited: bool = False
) -> Optional[Any]:
    """Call a function in a fresh process; None if its memory did not suffice.

    Args:
        function: See :func:`~mmlinglo.analysis.memory.call_in_fresh_process`.
        args: Its arguments.
        limited: Whether the function limits its memory. Libraries that do not
            check their allocations crash at the limit, which then counts as out
            of memory.

    Raises:
        ProcessDiedError: If the process died of something else.
        RuntimeError: If the function raised something else.
    """
    try:
        return call_in_fresh_process(function, *args)
    except OutOfMemoryError:
        return None
    except ProcessDiedError as error:
        if not limited or error.exitcode not in (-signal.SIGSEGV, -signal.SIGABRT):
            raise
        return None

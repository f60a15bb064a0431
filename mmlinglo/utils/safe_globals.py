# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Let ``torch.load(..., weights_only=True)`` read the logs in checkpoints of mmengine's runner.

The pickles of these logs call ``getattr`` and ``numpy.dtype``. Allowing the real functions would let a
file run code: ``getattr`` can reach ``__globals__`` and ``__builtins__`` of any function that the
file names. So stand-ins take their names, and do only what the logs need.
"""

from functools import partial
from pickle import UnpicklingError
from typing import Any, Callable, Dict, List

import numpy as np
from mmengine.logging import HistoryBuffer

STATISTICS = ('current', 'max', 'mean', 'min')
NUMBERS = {
    code: np.dtype(code)
    for code in ('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8')
}


def runner_globals() -> List[Any]:
    """List the classes and stand-ins to pass to ``torch.serialization.safe_globals``."""
    stand_ins: Dict[str, Callable] = {'builtins.getattr': _statistic, 'numpy.dtype': _number_dtype}
    for core in ('core', '_core'):  # numpy 1 or 2 wrote the file
        stand_ins[f'numpy.{core}.multiarray.scalar'] = _scalar
        stand_ins[f'numpy.{core}.multiarray._reconstruct'] = _empty_array
    named = [_named(path, function) for path, function in stand_ins.items()]
    return [*named, *map(type, NUMBERS.values()), np.ndarray, HistoryBuffer]


def _named(path: str, function: Callable) -> Callable:
    # torch before 2.6 reads the name from the function's attributes only.
    stand_in: Any = partial(function)
    stand_in.__module__, _, stand_in.__name__ = path.rpartition('.')
    stand_in.__qualname__ = stand_in.__name__
    return stand_in


def _statistic(owner: Any, name: Any) -> Callable:
    """Stands for getattr; returns a method of HistoryBuffer."""
    if owner is not HistoryBuffer or name not in STATISTICS:
        raise UnpicklingError('getattr of something other than the statistics of HistoryBuffer')
    return getattr(HistoryBuffer, name)


def _number_dtype(code: Any, align: Any = False, copy: Any = False) -> np.dtype:  # noqa: ARG001
    """Stands for numpy.dtype; returns a number type in this machine's byte order."""
    if not isinstance(code, str) or code not in NUMBERS:
        raise UnpicklingError('numpy.dtype of something other than numbers')
    return NUMBERS[code]


def _scalar(dtype: Any, content: Any) -> np.generic:
    if not isinstance(dtype, np.dtype) or not isinstance(content, bytes):
        raise UnpicklingError('a numpy scalar that is not a number')
    return np.frombuffer(content, dtype, count=1)[0]


def _empty_array(*_: Any) -> np.ndarray:
    """Stands for _reconstruct; the state that follows in the file fills the array."""
    return np.ndarray((0,), 'b')

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""What checkpoints of mmengine's runner hold besides tensors, for ``torch.load(..., weights_only=True)``.

Their logs are objects which pickle writes by ``getattr`` and ``numpy.dtype``. Allowed as they are,
these run code: ``getattr`` reaches ``__globals__`` and ``__builtins__`` of any function that a file
can name, and a file may assign to what is in such a dict. Stand-ins under the same names do what
the logs need and nothing else.
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
    """Classes and stand-ins to allow, for ``torch.serialization.safe_globals``."""
    stand_ins: Dict[str, Callable] = {'builtins.getattr': _statistic, 'numpy.dtype': _number_dtype}
    for core in ('core', '_core'):  # of numpy 1 and 2, in whose names the file was written
        stand_ins[f'numpy.{core}.multiarray.scalar'] = _scalar
        stand_ins[f'numpy.{core}.multiarray._reconstruct'] = _empty_array
    named = [_named(path, function) for path, function in stand_ins.items()]
    return [*named, *map(type, NUMBERS.values()), np.ndarray, HistoryBuffer]


def _named(path: str, function: Callable) -> Callable:
    # Before torch 2.6, which takes a name beside the function, its attributes are the only way.
    stand_in: Any = partial(function)
    stand_in.__module__, _, stand_in.__name__ = path.rpartition('.')
    stand_in.__qualname__ = stand_in.__name__
    return stand_in


def _statistic(owner: Any, name: Any) -> Callable:
    """For getattr: a method of HistoryBuffer's."""
    if owner is not HistoryBuffer or name not in STATISTICS:
        raise UnpicklingError('getattr of something else than the statistics of HistoryBuffer')
    return getattr(HistoryBuffer, name)


def _number_dtype(code: Any, align: Any = False, copy: Any = False) -> np.dtype:  # noqa: ARG001
    """For numpy.dtype: one of numpy's own, in this machine's byte order, which a file cannot change."""
    if not isinstance(code, str) or code not in NUMBERS:
        raise UnpicklingError('numpy.dtype of something else than numbers')
    return NUMBERS[code]


def _scalar(dtype: Any, content: Any) -> np.generic:
    if not isinstance(dtype, np.dtype) or not isinstance(content, bytes):
        raise UnpicklingError('a numpy scalar that is no number')
    return np.frombuffer(content, dtype, count=1)[0]


def _empty_array(*_: Any) -> np.ndarray:
    """For _reconstruct: what the state that follows in the file turns into the array."""
    return np.ndarray((0,), 'b')

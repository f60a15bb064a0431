# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Arguments of the layers and of the backbone: errors that name the argument, its value and what is allowed."""

from numbers import Integral, Real
from typing import Any, Optional, Sequence


def check_integer(name: str, value: Any, low: int, high: Optional[int] = None) -> None:
    """Refuse what is no integer from ``low`` to ``high``, which None leaves open.

    Raises:
        TypeError: If it is of another type; truth values are, too.
        ValueError: If it is out of range.
    """
    allowed = f'of at least {low}' if high is None else f'in [{low}, {high}]'
    if not is_integer(value):
        raise TypeError(f'{name} must be an integer {allowed}, got {value!r}')
    if value < low or (high is not None and value > high):
        raise ValueError(f'{name} must be an integer {allowed}, got {value!r}')


def is_integer(value: Any) -> bool:
    """Whether it is an integer; truth values are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a real number; truth values are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def get_length(values: Any) -> Optional[int]:
    """Length of a list or the like; None for others and for texts."""
    return len(values) if isinstance(values, Sequence) and not isinstance(values, str) else None

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Arguments of the layers and of the backbone: errors that name the argument, its value and what is allowed."""

from numbers import Integral, Real
from typing import Any, Optional, Sequence, Tuple


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


def parse_layout(
    layout: Optional[str], num_stages: int, attention: str, pos_encoding: Optional[str]
) -> Tuple[str, ...]:
    """Make one letter for each stage of a layout.

    Raises:
        ValueError: If it is none for these stages and this encoding, or there is no such attention
            or encoding.
    """
    from .network import ENCODINGS, LinGloNetwork  # here, because network.py imports this module

    for name, value, allowed in (
        ('attention', attention, list(LinGloNetwork.attentions)),
        ('pos_encoding', pos_encoding, [*ENCODINGS, 'absolute', None]),
    ):
        if value not in allowed:
            raise ValueError(f'{name} must be one of {allowed}, got {value!r}')
    letters = ('H',) * num_stages if layout is None else tuple(str(layout).split('-'))
    if len(letters) != num_stages or not set(letters) <= {'C', 'H'}:
        raise ValueError(
            f"layout must name C or H for each of {num_stages} stages, such as 'C-C-H-H', "
            f'got {layout!r}'
        )
    if 'C' in letters and pos_encoding not in ENCODINGS:
        raise ValueError(
            f'layout {layout!r} has convolutional blocks, whose convolution is pos_encoding: it '
            f'must be one of {list(ENCODINGS)}, got {pos_encoding!r}'
        )
    return letters

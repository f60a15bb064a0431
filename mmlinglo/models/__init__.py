# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from typing import Any

from .fast import ConditionalPositionalEncoding, KeyOnlyAttention, literal
from .network import DotProductAttention

__all__ = [
    'ConditionalPositionalEncoding',
    'DotProductAttention',
    'KeyOnlyAttention',
    'LinGlo',
    'literal',
]


def __getattr__(name: str) -> Any:
    """``LinGlo``, imported here because it needs mmengine and mmcv and the networks do not."""
    if name != 'LinGlo':
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from .linglo import LinGlo

    return LinGlo

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from .fast import ConditionalPositionalEncoding, KeyOnlyAttention, literal
from .linglo import LinGlo
from .network import DotProductAttention

__all__ = [
    'ConditionalPositionalEncoding',
    'DotProductAttention',
    'KeyOnlyAttention',
    'LinGlo',
    'literal',
]

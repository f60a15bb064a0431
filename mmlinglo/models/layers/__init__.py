# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from .attention import KeyOnlyAttention
from .positional_encoding import ConditionalPositionalEncoding

__all__ = ['ConditionalPositionalEncoding', 'KeyOnlyAttention']

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Exact rewritings of layers of :mod:`mmlinglo.models.network`, all behind one seam."""

from .attention import KeyOnlyAttention
from .ffn import FFN
from .positional_encoding import ConditionalPositionalEncoding
from .seam import Rewriting, literal

__all__ = ['FFN', 'ConditionalPositionalEncoding', 'KeyOnlyAttention', 'Rewriting', 'literal']

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Exact rewritings of layers of :mod:`mmlinglo.models.network`, all behind one seam."""

from mmlinglo.models.network import DotProductAttention, LinGloNetwork

from .attention import KeyOnlyAttention
from .ffn import FFN
from .positional_encoding import ConditionalPositionalEncoding
from .seam import Rewriting, literal

__all__ = [
    'FFN',
    'ConditionalPositionalEncoding',
    'FastLinGloNetwork',
    'KeyOnlyAttention',
    'Rewriting',
    'literal',
]


class FastLinGloNetwork(LinGloNetwork):
    """The network of rewritings, with the parameters and the values of the one that it replaces."""

    attentions = dict(key_only=KeyOnlyAttention, dot_product=DotProductAttention)
    encoding, ffn = ConditionalPositionalEncoding, FFN

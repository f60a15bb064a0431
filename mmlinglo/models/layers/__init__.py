# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from .attention import DotProductAttention, KeyOnlyAttention
from .blocks import FFN, ConvBlock, HybridBlock, zero_outside
from .patch_embed import LayerNorm, PatchEmbed
from .positional_encoding import AbsolutePositionEmbedding, ConditionalPositionalEncoding

__all__ = [
    'FFN',
    'AbsolutePositionEmbedding',
    'ConditionalPositionalEncoding',
    'ConvBlock',
    'DotProductAttention',
    'HybridBlock',
    'KeyOnlyAttention',
    'LayerNorm',
    'PatchEmbed',
    'zero_outside',
]

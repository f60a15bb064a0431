# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from .backbones import LinGlo
from .layers import ConditionalPositionalEncoding, DotProductAttention, KeyOnlyAttention

__all__ = ['ConditionalPositionalEncoding', 'DotProductAttention', 'KeyOnlyAttention', 'LinGlo']

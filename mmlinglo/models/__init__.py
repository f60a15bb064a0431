# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from .backbones import LinGlo
from .layers import ConditionalPositionalEncoding, KeyOnlyAttention

__all__ = ['ConditionalPositionalEncoding', 'KeyOnlyAttention', 'LinGlo']

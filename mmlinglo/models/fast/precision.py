# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Sums over many positions and products of weights alone are taken in float32 at least."""

from contextlib import nullcontext
from typing import ContextManager

import torch
from torch import Tensor


def autocast_off(x: Tensor) -> ContextManager:
    """Context without autocast on the device of ``x``."""
    # 'meta' has no autocast and does not know the context either; torch.amp.is_autocast_available
    # would say so, but torch.compile cannot trace it.
    if x.is_meta:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def full_precision(x: Tensor) -> Tensor:
    """``x`` in float32 if it is float16 or bfloat16, else ``x`` itself."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

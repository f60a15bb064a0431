# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Inference on a CPU by oneDNN with the bias, and what follows a layer, in the same loop.

These are PyTorch's operators for compiled models. Run eagerly, ``linear`` first
copies the bias to every row of its result, and an activation reads and writes the
map once more.
"""

from typing import Optional

import torch
from torch import Tensor
from torch.utils import _python_dispatch


def is_usable(x: Tensor) -> bool:
    """Whether these operators may do the work on ``x``.

    That is in float32 on a CPU with oneDNN, without gradients, where nobody else
    looks at the operations: no graph is captured and none are counted.
    """
    return (
        x.device.type == 'cpu'
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled('cpu')
        and _python_dispatch._get_current_dispatch_mode() is None
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """Linear layer, (..., C) to (..., C')."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, _contiguous(bias), 'none', [], '')


def depthwise_conv_gelu(x: Tensor, kernel: Tensor, bias: Optional[Tensor]) -> Tensor:
    """GELU of a depth-wise convolution of (B, C, H, W) by kernels (C, 1, 3, 3), same size out."""
    padding = [kernel.shape[-1] // 2] * 2
    return torch.ops.mkldnn._convolution_pointwise(
        x, kernel, _contiguous(bias), padding, [1, 1], [1, 1], len(kernel), 'gelu', [], 'none'
    )


def _contiguous(bias: Optional[Tensor]) -> Optional[Tensor]:
    return None if bias is None else bias.contiguous()  # these operators ignore its stride

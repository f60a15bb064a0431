# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import network
from . import gpu, onednn
from .autocorrelation import CHUNK_ELEMENTS
from .positional_encoding import ConditionalPositionalEncoding
from .precision import autocast_off
from .seam import Rewriting


class FFN(Rewriting, network.FFN, plain=True):
    """Feed-forward network (Fig. 2) for inference on a CPU and for training on a GPU.

    In inference on a CPU, the encoding is one convolution, with the GELU in its loop, and a map
    that leaves the cache is computed in bands of rows. That is the same arithmetic, up to twice as
    fast. In training on a GPU, the output of the GELU is computed again instead of kept.
    """

    parts = (('fc1', nn.Linear), ('act', nn.GELU), ('fc2', nn.Linear))

    def rewrite(self, x: Tensor) -> Optional[Tensor]:
        encoding = self.pos_encoding
        if not isinstance(self.excitation, nn.Identity):
            return None
        if gpu.is_usable(x) and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            hidden = encoding(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return _project_gelu(hidden, self.fc2.weight, self.fc2.bias)
        if (
            not onednn.is_usable(x)
            or type(encoding) is not ConditionalPositionalEncoding
            or encoding.fast is False
            or not encoding.is_linear
            or encoding.uses_batch_statistics
        ):
            return None
        kernel, bias = encoding.kernel_and_bias(x)
        if x[..., 0].numel() * self.fc1.out_features <= CHUNK_ELEMENTS:
            hidden = self._hidden(x, kernel, bias)
            return onednn.linear(hidden, self.fc2.weight, self.fc2.bias)
        return torch.cat([self._forward_bands(image, kernel, bias) for image in x.split(1)])

    def _forward_bands(self, x: Tensor, kernel: Tensor, bias: Optional[Tensor]) -> Tensor:
        """One image, (1, H, W, C), in bands of rows whose hidden map stays in the cache."""
        height = x.shape[1]
        num_bands = -(-x[..., 0].numel() * self.fc1.out_features // CHUNK_ELEMENTS)
        rows = -(-height // min(num_bands, height))
        bands = []
        for start in range(0, height, rows):
            above = min(start, 1)  # the convolution sees a row more on either side
            hidden = self._hidden(x[:, start - above : start + rows + 1], kernel, bias)
            hidden = hidden[:, above : above + rows]
            bands.append(onednn.linear(hidden, self.fc2.weight, self.fc2.bias))
        return torch.cat(bands, dim=1)

    def _hidden(self, x: Tensor, kernel: Tensor, bias: Optional[Tensor]) -> Tensor:
        hidden = onednn.linear(x, self.fc1.weight, self.fc1.bias).permute(0, 3, 1, 2)
        return onednn.depthwise_conv_gelu(hidden, kernel, bias).permute(0, 2, 3, 1)


def _project_gelu(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """``linear(gelu(x), weight, bias)``, which keeps ``x`` alone for the backward pass."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with autocast_off(x):
        return _ProjectGELU.apply(x, weight, bias)


class _ProjectGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
        x, weight = ctx.saved_tensors
        with autocast_off(x):
            rows = grad.flatten(0, -2)
            grad_x = torch.ops.aten.gelu_backward(grad @ weight, x)
            grad_weight = rows.t() @ F.gelu(x).flatten(0, -2)
            return grad_x, grad_weight, rows.sum(0) if ctx.has_bias else None

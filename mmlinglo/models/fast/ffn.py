# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from typing import Optional

import torch
from torch import Tensor, nn

from .. import network
from . import onednn
from .autocorrelation import CHUNK_ELEMENTS
from .positional_encoding import ConditionalPositionalEncoding
from .seam import Rewriting


class FFN(Rewriting, network.FFN, plain=True):
    """Feed-forward network (Fig. 2) for inference on a CPU.

    The encoding is one convolution, with the GELU in its loop, and a map that leaves the cache
    is computed in bands of rows. That is the same arithmetic, up to twice as fast.
    """

    parts = (('fc1', nn.Linear), ('act', nn.GELU), ('fc2', nn.Linear))

    def rewrite(self, x: Tensor) -> Optional[Tensor]:
        encoding = self.pos_encoding
        if (
            not onednn.is_usable(x)
            or type(encoding) is not ConditionalPositionalEncoding
            or encoding.fast is False
            or not encoding.is_linear
            or encoding.uses_batch_statistics
            or not isinstance(self.excitation, nn.Identity)
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

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

LayerNorm = partial(nn.LayerNorm, eps=1e-6)  # PVT's epsilon


class PatchEmbed(nn.Module):
    """Down-sampling convolution and LayerNorm (paper Sec. 3.3).

    Args:
        in_channels: Channels of the input.
        embed_dims: Channels of the output.
        stride: Factor of the down-sampling.
        overlap: True for LinGlo's kernels of 2 * stride - 1 with as much padding
            as keeps ceil(H / stride) positions (7 for stride 4, 3 for stride 2);
            False for the patches of ViT and PVT, with kernels of ``stride``
            (Sec. 5.4), for which inputs are padded with zeros on the right and at
            the bottom to a multiple of the stride.
    """

    def __init__(
        self, in_channels: int, embed_dims: int, stride: int, overlap: bool = True
    ) -> None:
        super().__init__()
        self.stride = stride
        self.overlap = overlap
        kernel_size, padding = (2 * stride - 1, stride - 1) if overlap else (stride, 0)
        self.conv = nn.Conv2d(in_channels, embed_dims, kernel_size, stride, padding)
        self.norm = LayerNorm(embed_dims)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, ceil(H / stride), ceil(W / stride), C')."""
        if not self.overlap:
            height, width = x.shape[-2:]
            x = F.pad(x, (0, -width % self.stride, 0, -height % self.stride))
        return self.norm(self.conv(x).permute(0, 2, 3, 1))

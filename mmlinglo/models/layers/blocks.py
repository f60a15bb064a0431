# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from typing import Optional

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn

from .chunking import CHUNK_ELEMENTS, PendingGradient, by_images
from .patch_embed import LayerNorm
from .positional_encoding import ConditionalPositionalEncoding, depthwise_conv
from .precision import cpu_autocast_is_on


class FFN(nn.Module):
    """Feed-forward network with the positional encoding inside (paper Fig. 2).

    Args:
        embed_dims: Channels C of the input and the output.
        feedforward_channels: Channels between the two linear layers.
        pos_encoding: Module on (B, C, H, W) maps after the first linear layer;
            None for none.
        excitation: Module on (B, C, H, W) maps before the second linear layer;
            None for none.
    """

    def __init__(
        self,
        embed_dims: int,
        feedforward_channels: int,
        pos_encoding: Optional[nn.Module] = None,
        excitation: Optional[nn.Module] = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dims, feedforward_channels)
        self.pos_encoding = pos_encoding or nn.Identity()
        self.act = nn.GELU()
        self.excitation = excitation or nn.Identity()
        self.fc2 = nn.Linear(feedforward_channels, embed_dims)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        if self._bands_pay(x):
            return torch.cat([self._forward_image(image) for image in x.split(1)])
        if self._images_pay(x):
            return self._forward_by_images(x)
        return self.fc2(self._hidden(x))

    def _hidden(self, x: Tensor) -> Tensor:
        # A (B, H, W, C) tensor permuted to (B, C, H, W) is a channels-last map: no copy.
        x = self.pos_encoding(self.fc1(x).permute(0, 3, 1, 2))
        return self.excitation(self.act(x)).permute(0, 2, 3, 1)

    def _is_large_and_linear(self, x: Tensor) -> bool:
        """Whether the hidden map leaves a CPU's cache, and all of it is two layers and a convolution."""
        return (
            x.device.type == 'cpu'
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and not cpu_autocast_is_on()
            and isinstance(self.pos_encoding, ConditionalPositionalEncoding)
            and isinstance(self.excitation, nn.Identity)
            and x[..., 0].numel() * self.fc1.out_features > CHUNK_ELEMENTS
        )

    def _bands_pay(self, x: Tensor) -> bool:
        """Whether to go through an image in bands of rows, whose hidden map stays in the cache.

        That is the same arithmetic, and two to three times as fast on a CPU
        when the hidden map is large. No gradient must need the map.
        """
        if torch.is_grad_enabled() or not self._is_large_and_linear(x):
            return False
        return self.pos_encoding.deploy

    def _images_pay(self, x: Tensor) -> bool:
        """Whether to train image by image, with the encoded map computed again in the backward pass."""
        if not torch.is_grad_enabled() or not self._is_large_and_linear(x):
            return False
        return self.pos_encoding.is_linear

    def _forward_by_images(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        pending = PendingGradient() if self.pos_encoding.uses_batch_statistics else None
        kernel, bias = self.pos_encoding.kernel_and_bias(hidden.permute(0, 3, 1, 2), pending)
        return by_images(
            _encode_and_project,
            hidden,
            kernel,
            bias,
            self.fc2.weight,
            self.fc2.bias,
            pending=pending,
        )

    def _forward_image(self, x: Tensor) -> Tensor:
        """One image of :meth:`forward`, (1, H, W, C)."""
        height, width = x.shape[1:3]
        num_bands = -(-height * width * self.fc1.out_features // CHUNK_ELEMENTS)
        rows = -(-height // min(num_bands, height))
        bands = []
        for start in range(0, height, rows):
            above = min(start, 1)  # the convolution sees a row more on either side
            hidden = self._hidden(x[:, start - above : start + rows + 1])
            bands.append(self.fc2(hidden[:, above : above + rows]))
        return torch.cat(bands, dim=1)


def _encode_and_project(
    hidden: Tensor, kernel: Tensor, kernel_bias: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    encoded = depthwise_conv(hidden.permute(0, 3, 1, 2), kernel, kernel_bias)
    return F.linear(F.gelu(encoded).permute(0, 2, 3, 1), weight, bias)


class HybridBlock(nn.Module):
    """Pre-norm encoder block (paper Fig. 3b), "H" of Table 5.

    Args:
        attn: Attention on (B, N, C) tokens.
        ffn: Feed-forward network on (B, H, W, C) maps.
        embed_dims: Channels C.
        drop_path: Probability of dropping each of the two for an image.
    """

    def __init__(
        self, attn: nn.Module, ffn: nn.Module, embed_dims: int, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(embed_dims)
        self.attn = attn
        self.norm2 = LayerNorm(embed_dims)
        self.ffn = ffn
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        x = x + self.drop_path(self.attn(self.norm1(x).flatten(1, 2)).view_as(x))
        return x + self.drop_path(self.ffn(self.norm2(x)))


class ConvBlock(nn.Module):
    """Convolutional block with squeeze-and-excitation, "C" of Table 5.

    The paper says no more of it than that, and that its parameters are "almost
    the same" as a hybrid block's. Here it is the hybrid block without the
    attention, whose feed-forward network (expand, depth-wise convolution,
    project: an inverted residual) gets a squeeze-and-excitation before the
    projection. With 2 C / r squeezed channels at expansion r that has the 4 C^2
    weights of the attention that it replaces, so that both blocks have the same
    size in the training form and when deployed, and differ in nothing but the
    attention.

    Args:
        ffn: Feed-forward network with excitation, on (B, H, W, C) maps.
        embed_dims: Channels C.
        drop_path: Probability of dropping the network for an image.
    """

    def __init__(self, ffn: nn.Module, embed_dims: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm = LayerNorm(embed_dims)
        self.ffn = ffn
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        return x + self.drop_path(self.ffn(self.norm(x)))

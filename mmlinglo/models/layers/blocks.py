# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from typing import Optional

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn

from . import onednn
from .chunking import CHUNK_ELEMENTS, PendingGradient, linear_by_images
from .patch_embed import LayerNorm
from .patch_moments import linear_patch_moments
from .positional_encoding import ConditionalPositionalEncoding, depthwise_conv, has_hooks
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

    def forward(self, x: Tensor, outside: Optional[Tensor] = None) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C).

        Positions ``outside`` of their image, (B, H, W, 1) bool, are zeros to the
        positional encoding; None if there are none.
        """
        if self._fusing_pays(x):
            return self._forward_fused(x, outside)
        if self._images_pay(x):
            return self._forward_by_images(x, outside)
        # A (B, H, W, C) tensor permuted to (B, C, H, W) is a channels-last map: no copy.
        x = self.pos_encoding(zero_outside(self.fc1(x), outside).permute(0, 3, 1, 2))
        return self.fc2(self.excitation(self.act(x)).permute(0, 2, 3, 1))

    def _fusing_pays(self, x: Tensor) -> bool:
        """Whether to infer with the GELU in the convolution's loop, band by band of a large map.

        That is the same arithmetic, up to twice as fast on a CPU.
        """
        return (
            onednn.is_usable(x)
            and self._is_two_layers_and_a_convolution()
            and not self.pos_encoding.uses_batch_statistics
        )

    def _images_pay(self, x: Tensor) -> bool:
        """Whether to train image by image, with the encoded map computed again in the backward pass.

        On a CPU, where the hidden map leaves the cache.
        """
        return (
            torch.is_grad_enabled()
            and x.device.type == 'cpu'
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and not cpu_autocast_is_on()
            and self._hidden_size(x) > CHUNK_ELEMENTS
            and self._is_two_layers_and_a_convolution()
        )

    def _is_two_layers_and_a_convolution(self) -> bool:
        """And no module whose call does more, by its class or by hooks."""
        encoding = self.pos_encoding
        return (
            type(self.fc1) is type(self.fc2) is nn.Linear
            and isinstance(encoding, ConditionalPositionalEncoding)
            and encoding.is_linear
            and isinstance(self.excitation, nn.Identity)
            and isinstance(self.act, nn.GELU)
            and not any(has_hooks(child) for child in self.children())
        )

    def _hidden_size(self, x: Tensor) -> int:
        return x[..., 0].numel() * self.fc1.out_features

    def _forward_by_images(self, x: Tensor, outside: Optional[Tensor]) -> Tensor:
        encoding, pending, moments = self.pos_encoding, None, None
        if encoding.uses_batch_statistics and outside is None:
            pending = PendingGradient()
            hidden, *moments = linear_patch_moments(x, self.fc1.weight, self.fc1.bias, pending)
        else:
            hidden = zero_outside(self.fc1(x), outside)
        kernel, bias = encoding.kernel_and_bias(hidden.permute(0, 3, 1, 2), moments)
        return linear_by_images(
            _encode,
            hidden,
            kernel,
            bias,
            weight=self.fc2.weight,
            bias=self.fc2.bias,
            pending=pending,
        )

    def _forward_fused(self, x: Tensor, outside: Optional[Tensor]) -> Tensor:
        kernel, bias = self.pos_encoding.kernel_and_bias(x)
        if self._hidden_size(x) <= CHUNK_ELEMENTS:
            hidden = self._hidden(x, outside, kernel, bias)
            return onednn.linear(hidden, self.fc2.weight, self.fc2.bias)
        masks = [None] * len(x) if outside is None else outside.split(1)
        return torch.cat(
            [
                self._forward_bands(image, mask, kernel, bias)
                for image, mask in zip(x.split(1), masks)
            ]
        )

    def _forward_bands(
        self, x: Tensor, outside: Optional[Tensor], kernel: Tensor, bias: Tensor
    ) -> Tensor:
        """One image, (1, H, W, C), in bands of rows whose hidden map stays in the cache."""
        height = x.shape[1]
        num_bands = -(-self._hidden_size(x) // CHUNK_ELEMENTS)
        rows = -(-height // min(num_bands, height))
        bands = []
        for start in range(0, height, rows):
            above = min(start, 1)  # the convolution sees a row more on either side
            seen = slice(start - above, start + rows + 1)
            mask = None if outside is None else outside[:, seen]
            hidden = self._hidden(x[:, seen], mask, kernel, bias)
            hidden = hidden[:, above : above + rows]
            bands.append(onednn.linear(hidden, self.fc2.weight, self.fc2.bias))
        return torch.cat(bands, dim=1)

    def _hidden(self, x: Tensor, outside: Optional[Tensor], kernel: Tensor, bias: Tensor) -> Tensor:
        hidden = zero_outside(onednn.linear(x, self.fc1.weight, self.fc1.bias), outside)
        return onednn.depthwise_conv_gelu(hidden.permute(0, 3, 1, 2), kernel, bias).permute(
            0, 2, 3, 1
        )


def zero_outside(x: Tensor, outside: Optional[Tensor]) -> Tensor:
    """Positions ``outside`` of their image, (B, H, W, 1) bool, as zeros; ``x`` as it is for None."""
    return x if outside is None else x.masked_fill(outside, 0)


def _encode(hidden: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    if onednn.is_usable(hidden):
        hidden = onednn.depthwise_conv_gelu(hidden.permute(0, 3, 1, 2), kernel, bias)
        return hidden.permute(0, 2, 3, 1)
    encoded = depthwise_conv(hidden.permute(0, 3, 1, 2), kernel, bias)
    return F.gelu(encoded).permute(0, 2, 3, 1)


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

    def forward(self, x: Tensor, outside: Optional[Tensor] = None) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C).

        What comes out inside of an image does not depend on the positions ``outside``
        of it, (B, H, W, 1) bool; None if there are none.
        """
        tokens = None if outside is None else outside.flatten(1)
        x = x + self.drop_path(self.attn(self.norm1(x).flatten(1, 2), tokens).view_as(x))
        return x + self.drop_path(self.ffn(self.norm2(x), outside))


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

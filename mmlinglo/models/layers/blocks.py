# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from typing import Optional

from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn

from .patch_embed import LayerNorm


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
        # A (B, H, W, C) tensor permuted to (B, C, H, W) is a channels-last map: no copy.
        x = self.pos_encoding(self.fc1(x).permute(0, 3, 1, 2))
        x = self.excitation(self.act(x))
        return self.fc2(x.permute(0, 2, 3, 1))


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

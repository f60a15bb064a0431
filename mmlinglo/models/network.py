# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""LinGlo as the paper writes it (arXiv 2207.00188), from the attention to the network.

Maps are (B, H, W, C) between the layers and (B, C, H, W) in convolutions; tokens are
(B, N, C) with N = H * W. Sections, equations, tables and figures are the paper's.
"""

from functools import partial
from typing import Callable, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation, StochasticDepth

from .arch import ARCHS, Arch

LayerNorm = partial(nn.LayerNorm, eps=1e-6)  # PVT's epsilon; the paper gives none
NormLayer = Optional[Callable[[int], nn.Module]]
Layer = Optional[nn.Module]
# Number of branches, and whether there is a skip connection, in the rows of Table 6.
ENCODINGS = {'CPE': (1, False), 'R-CPE': (1, True), 'P-CPE': (4, False), 'RP-CPE': (4, True)}


class KeyOnlyAttention(nn.Module):
    """Key-only attention (Sec. 3.1, Fig. 1): no queries, and no interactions between pairs.

    Each head scores every position with one learned vector and sums the keys by these
    weights into one global context, which modulates the values::

        K = X W_K + b_K,  V = X W_V + b_V
        A = softmax over positions of (K_head . saliency_head) / sqrt(D)    (Eq. 2)
        G = sum_i A_i K_i                                                   (Eq. 3)
        Y = ((G * V) U_1 + K) U_2                                           (Eq. 4)

    W_K is :attr:`key`, W_V :attr:`value`, U_1 :attr:`mix`, U_2 :attr:`proj`, and D the channels
    of a head. ``qkv_bias`` is for b_K and b_V. The cost is linear in N: 4 N C^2 multiply-adds.
    Raises ValueError if ``num_heads`` does not divide ``embed_dims``.
    """

    def __init__(self, embed_dims: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        if num_heads < 1 or embed_dims % num_heads:
            raise ValueError(f'num_heads={num_heads} must divide embed_dims={embed_dims}')
        self.key = nn.Linear(embed_dims, embed_dims, bias=qkv_bias)
        self.value = nn.Linear(embed_dims, embed_dims, bias=qkv_bias)
        self.mix = nn.Linear(embed_dims, embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.saliency = nn.Parameter(0.02 * torch.randn(num_heads, embed_dims // num_heads))
        self.softmax = nn.Softmax(dim=-1)  # a module, so that hooks can see the weights

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to tokens (B, N, C)."""
        key, value = self.key(x), self.value(x)
        heads = key.unflatten(-1, self.saliency.shape)
        logits = torch.einsum('bnhd,hd->bhn', heads, self.saliency) / heads.shape[-1] ** 0.5
        context = torch.einsum('bhn,bnhd->bhd', self.softmax(logits), heads).flatten(1)
        return self.proj(self.mix(context.unsqueeze(1) * value) + key)


class DotProductAttention(nn.Module):
    """Standard multi-head attention, ``softmax(Q K^T / sqrt(D)) V``, the comparison of Fig. 4."""

    def __init__(self, embed_dims: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)
        self.proj = nn.Linear(embed_dims, embed_dims)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to tokens (B, N, C)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).flatten(2))


class ConditionalPositionalEncoding(nn.Module):
    """Depth-wise convolutions as positional encoding (Sec. 3.2, Fig. 2).

    The sum of ``num_branches`` branches, each a 3 x 3 depth-wise convolution followed by
    ``norm_layer`` (None: by nothing, and with a bias), and of the input if ``skip``.
    """

    def __init__(self, channels: int, num_branches: int, skip: bool, norm_layer: NormLayer) -> None:
        super().__init__()
        self.skip = skip
        self.branches = nn.ModuleList(nn.Sequential() for _ in range(num_branches))
        for branch in self.branches:
            bias = norm_layer is None
            branch.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=bias)
            if norm_layer is not None:
                norm = norm_layer(channels)
                name = {nn.GroupNorm: 'gn', nn.InstanceNorm2d: 'in'}.get(type(norm), 'bn')
                branch.add_module(name, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        outs = [branch(x) for branch in self.branches]
        return sum(outs, start=x) if self.skip else sum(outs[1:], start=outs[0])


class AbsolutePositionEmbedding(nn.Module):
    """A learned grid of ``size`` x ``size`` positions as in PVT (Sec. 5.4), resized for other maps."""

    def __init__(self, embed_dims: int, size: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, embed_dims, size, size))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        grid = F.interpolate(self.pos_embed, x.shape[1:3], mode='bilinear', align_corners=False)
        return x + grid.permute(0, 2, 3, 1)


class PatchEmbed(nn.Module):
    """Down-sampling by overlapping kernels (Sec. 3.3) or by ViT's patches (Sec. 5.4), LayerNorm."""

    def __init__(self, in_channels: int, embed_dims: int, stride: int, overlap: bool) -> None:
        super().__init__()
        self.stride = stride
        self.overlap = overlap
        kernel_size, padding = (2 * stride - 1, stride - 1) if overlap else (stride, 0)
        self.conv = nn.Conv2d(in_channels, embed_dims, kernel_size, stride, padding)
        self.norm = LayerNorm(embed_dims)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, ceil(H / stride), ceil(W / stride), C')."""
        if not self.overlap:
            x = F.pad(x, (0, -x.shape[3] % self.stride, 0, -x.shape[2] % self.stride))
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


class FFN(nn.Module):
    """Feed-forward network (Fig. 2): expand, encode positions, GELU, (excite,) project."""

    def __init__(self, embed_dims: int, hidden_dims: int, encoding: Layer, excite: Layer) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dims, hidden_dims)
        self.pos_encoding = encoding or nn.Identity()
        self.act = nn.GELU()
        self.excitation = excite or nn.Identity()
        self.fc2 = nn.Linear(hidden_dims, embed_dims)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        hidden = self.act(self.pos_encoding(self.fc1(x).permute(0, 3, 1, 2)))
        return self.fc2(self.excitation(hidden).permute(0, 2, 3, 1))


class HybridBlock(nn.Module):
    """Encoder block (Fig. 3b), "H" of Table 5: attention, then FFN, pre-norm and residual."""

    def __init__(self, embed_dims: int, attn: nn.Module, ffn: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(embed_dims)
        self.attn = attn
        self.norm2 = LayerNorm(embed_dims)
        self.ffn = ffn
        self.drop_path = StochasticDepth(drop_path, mode='row')

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        x = x + self.drop_path(self.attn(self.norm1(x).flatten(1, 2)).view_as(x))
        return x + self.drop_path(self.ffn(self.norm2(x)))


class ConvBlock(nn.Module):
    """Convolutional block, "C" of Table 5: squeeze-and-excitation in the FFN, no attention."""

    def __init__(self, embed_dims: int, ffn: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm = LayerNorm(embed_dims)
        self.ffn = ffn
        self.drop_path = StochasticDepth(drop_path, mode='row')

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        return x + self.drop_path(self.ffn(self.norm(x)))


class Stage(nn.Module):
    """Down-sampling and position embedding, if there are any, then blocks, at one resolution."""

    def __init__(self, downsample: Layer, pos_embed: Layer, blocks: List[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.pos_embed = pos_embed or nn.Identity()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, ceil(H / s), ceil(W / s), C'), s the down-sampling's stride."""
        if self.downsample is not None:
            x = self.downsample(x.permute(0, 3, 1, 2))
        return self.blocks(self.pos_embed(x))


class LinGloNetwork(nn.Module):
    """The network of Sec. 3.3 and Fig. 3b, LinGlo-b0 by default.

    ``layout`` names C or H for each stage (Table 5). ``pos_encoding`` is a row of Table 6,
    ``'absolute'`` (Sec. 5.4) or None. Stochastic depth grows linearly to ``drop_path_rate``.
    Stages after the last of ``out_indices`` are not built; each has an output norm of its own.
    """

    attentions = dict(key_only=KeyOnlyAttention, dot_product=DotProductAttention)
    encoding, ffn = ConditionalPositionalEncoding, FFN

    def __init__(
        self,
        arch: Arch = ARCHS['b0'],
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        attention: str = 'key_only',
        pos_encoding: Optional[str] = 'RP-CPE',
        layout: Optional[Sequence[str]] = None,
        overlap: bool = True,
        img_size: int = 224,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        qkv_bias: bool = True,
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.out_indices = tuple(out_indices)
        dims, strides = arch.embed_dims, arch.strides
        last = max(sum(arch.depths) - 1, 1)
        rates = (drop_path_rate * i / last for i in range(last + 1))

        def build_block(i: int) -> nn.Module:
            hidden_dims, encoding, excite = int(dims[i] * arch.mlp_ratio[i]), None, None
            if pos_encoding in ENCODINGS:
                encoding = self.encoding(hidden_dims, *ENCODINGS[pos_encoding], norm_layer)
            if layout and layout[i] == 'C':
                # As many parameters as the attention: the paper says "almost the same".
                excite = SqueezeExcitation(hidden_dims, round(2 * dims[i] / arch.mlp_ratio[i]))
            ffn = self.ffn(dims[i], hidden_dims, encoding, excite)
            if excite:
                return ConvBlock(dims[i], ffn, next(rates))
            attn = self.attentions[attention](dims[i], arch.num_heads[i], qkv_bias)
            return HybridBlock(dims[i], attn, ffn, next(rates))

        self.patch_embed = PatchEmbed(in_channels, dims[0], strides[0], overlap)
        self.stages = nn.ModuleList()
        for i in range(max(out_indices) + 1):
            downsample = pos_embed = None
            img_size = -(-img_size // strides[i])
            if i and strides[i] > 1:
                downsample = PatchEmbed(dims[i - 1], dims[i], strides[i], overlap)
            if pos_encoding == 'absolute':
                pos_embed = AbsolutePositionEmbedding(dims[i], img_size)
            blocks = [build_block(i) for _ in range(arch.depths[i])]
            self.stages.append(Stage(downsample, pos_embed, blocks))
        for i in out_indices:
            self.add_module(f'norm{i}', LayerNorm(dims[i]))

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Map (B, in_channels, H, W) to (B, C_i, ceil(H / s_i), ceil(W / s_i)) of each out index i."""
        maps = [self.patch_embed(x)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        normed = (getattr(self, f'norm{i}')(maps[i + 1]) for i in self.out_indices)
        return tuple(out.permute(0, 3, 1, 2) for out in normed)

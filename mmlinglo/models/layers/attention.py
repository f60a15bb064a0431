# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from mmengine.utils import digit_version
from torch import Tensor, nn

from ..arguments import check_integer
from .precision import autocast_off, full_precision

# Whether code that is compiled may ask if a size is known. At 2.5 it may not, from 2.9 on it may.
SIZES_CAN_BE_ASKED = digit_version(torch.__version__) >= digit_version('2.9')
# Buffers of the deployed form, see _score_directions and _products.
PRODUCTS = ('score_directions', 'value_product', 'key_product', 'shift')


class KeyOnlyAttention(nn.Module):
    r"""Key-only attention (paper Sec. 3.1, Eq. 2-4, Fig. 1).

    No queries and no pairwise interactions: each head scores every position
    with one learned vector, sums the keys by these weights into one global
    context, and lets it modulate the values::

        K = X W_K + b_K,  V = X W_V + b_V
        A = softmax over positions of (K_head . saliency_head) / sqrt(D)    (Eq. 2)
        G = sum_i A_i K_i                                                   (Eq. 3)
        Y = ((G * V) U_1 + K) U_2                                           (Eq. 4)

    with ``W_K`` = :attr:`key`, ``W_V`` = :attr:`value`, ``U_1`` = :attr:`mix`,
    ``U_2`` = :attr:`proj`, and D = ``embed_dims / num_heads`` channels a head.
    This literal order costs 4 N C^2 multiply-adds an image, besides O(N C), for N
    positions and C channels.

    Nothing between X and Y is non-linear but the softmax that makes G. The scores
    are X (W_K,head saliency_head) up to a constant, G_head = (sum_i A_i X_i)
    W_K,head + b_K,head, and with the products of weights U_1 U_2, W_K U_2 and
    b = (b_K + b_mix) U_2 + b_proj::

        folded  Y = X (W_V diag(G) U_1 U_2 + W_K U_2) + b(G)    N C^2 + C^3
        spared  Y = (G * V) U_1 U_2 + X W_K U_2 + b             3 N C^2

    Folded pays with many positions and few channels. In training, where the
    products are made anew in each call, it is taken where N C^2 + C^3 an image and
    2 C^3 a batch are below 5/8 of the literal cost (small products are slower a
    multiply-add), else the literal order. Once :meth:`switch_to_deploy` has made
    the products, it is taken where N > C, else the spared order. All orders use
    the same parameters and agree to rounding, gradients included. With sizes that
    are not known when a graph is captured, it is the folded one.

    Args:
        embed_dims: Channels C of the input and the output.
        num_heads: Heads; must divide ``embed_dims``.
        qkv_bias: Whether :attr:`key` and :attr:`value` have a bias (the name
            is the field's; there is no query). :attr:`mix` and :attr:`proj`
            always have one.

    Raises:
        ValueError: If ``num_heads`` does not divide ``embed_dims``, or one is below 1.
        TypeError: If one is no integer.

    Example:
        >>> attn = KeyOnlyAttention(embed_dims=64, num_heads=2)
        >>> attn(torch.rand(1, 3136, 64)).shape
        torch.Size([1, 3136, 64])
    """

    def __init__(self, embed_dims: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        _check_heads(embed_dims, num_heads)
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.head_dims = embed_dims // num_heads
        self.scale = self.head_dims**-0.5
        self.deploy = False

        self.key = nn.Linear(embed_dims, embed_dims, bias=qkv_bias)
        self.value = nn.Linear(embed_dims, embed_dims, bias=qkv_bias)
        self.mix = nn.Linear(embed_dims, embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.saliency = nn.Parameter(torch.empty(num_heads, self.head_dims))
        nn.init.trunc_normal_(self.saliency, std=0.02)
        # A module, so that hooks see the weights of every forward pass.
        self.softmax = nn.Softmax(dim=-1)

    def saliency_weights(self, x: Tensor, outside: Optional[Tensor] = None) -> Tensor:
        """Weight of every position in every head (Eq. 2).

        Args:
            x: Tokens X, (B, N, C).
            outside: Positions that get no weight, (B, N) bool; None for none.

        Returns:
            Weights A, (B, num_heads, N), which sum to 1 over the N positions;
            at least float32, since N may exceed the largest float16 number.
        """
        with autocast_off(x):
            scores = full_precision(x) @ full_precision(self._score_directions()).t()
            return self._normalize(scores.transpose(1, 2), outside)

    def forward(self, x: Tensor, outside: Optional[Tensor] = None) -> Tensor:
        """Apply the attention.

        Args:
            x: Tokens X, (B, N, C).
            outside: Positions outside of their image, (B, N) bool, which the
                others do not depend on; None for none. Each image has at least
                one position inside.

        Returns:
            Tokens Y, (B, N, C).
        """
        if self._folding_pays(x):
            return self._forward_folded(x, outside)
        if self._is_precomputed:
            return self._forward_spared(x, outside)
        return self._forward_literal(x, outside)

    def switch_to_deploy(self) -> None:
        """Compute the products of weights once, for evaluation; outputs agree to rounding.

        Parameters and state dict stay as they are. The products are made again
        when a state dict is loaded or evaluation mode is set, and are not used in
        training mode. A second call does nothing.
        """
        if self.deploy:
            return
        self.deploy = True
        for name in PRODUCTS:
            self.register_buffer(name, None, persistent=False)
        self.register_load_state_dict_post_hook(lambda module, _: module._precompute())
        self._precompute()

    def train(self, mode: bool = True) -> 'KeyOnlyAttention':
        """Set the mode; the products of the deployed form follow the weights."""
        super().train(mode)
        if self.deploy and not mode:
            self._precompute()
        return self

    def extra_repr(self) -> str:
        return f'embed_dims={self.embed_dims}, num_heads={self.num_heads}, deploy={self.deploy}'

    @property
    def _is_precomputed(self) -> bool:
        return self.deploy and not self.training

    def _folding_pays(self, x: Tensor) -> bool:
        batch_size, num_tokens, channels = x.shape
        if self._is_precomputed:
            loses = num_tokens <= channels
        else:
            loses = 3 * batch_size * num_tokens <= 2 * (batch_size + 2) * channels
        # A free size must not decide: the guard would narrow the sizes that the graph accepts.
        if torch.compiler.is_compiling() and SIZES_CAN_BE_ASKED:
            from torch.fx.experimental.symbolic_shapes import statically_known_true

            return not statically_known_true(loses)
        return torch.compiler.is_compiling() or torch.jit.is_tracing() or not loses

    def _normalize(self, scores: Tensor, outside: Optional[Tensor]) -> Tensor:
        if outside is not None:
            scores = scores.masked_fill(outside.unsqueeze(1), float('-inf'))
        return self.softmax(scores)

    def _forward_literal(self, x: Tensor, outside: Optional[Tensor] = None) -> Tensor:
        key = self.key(x)
        with autocast_off(x):
            heads = full_precision(key).unflatten(-1, (self.num_heads, self.head_dims))
            saliency = full_precision(self.saliency) * self.scale
            logits = torch.einsum('bnhd,hd->bhn', heads, saliency)
            weights = self._normalize(logits, outside)
            context = torch.einsum('bhn,bnhd->bhd', weights, heads)
        context = context.flatten(1).unsqueeze(1).to(key.dtype)
        return self.proj(self.mix(context * self.value(x)) + key)

    def _forward_folded(self, x: Tensor, outside: Optional[Tensor] = None) -> Tensor:
        context = self._context(x, outside)
        # Small products, whose rounding would reach every position: at least float32.
        with autocast_off(x):
            u_12, w_key_u_2, shift = (full_precision(product) for product in self._products())
            w_value = full_precision(self.value.weight).t()
            matrix = (context.unsqueeze(1) * w_value) @ u_12 + w_key_u_2
            if self.value.bias is None:
                bias = shift.expand(x.shape[0], -1)
            else:
                bias = shift + (context * full_precision(self.value.bias)) @ u_12
        return torch.baddbmm(bias.unsqueeze(1).to(x.dtype), x, matrix.to(x.dtype))

    def _forward_spared(self, x: Tensor, outside: Optional[Tensor] = None) -> Tensor:
        u_12, w_key_u_2, shift = self._products()
        modulated = self._context(x, outside).unsqueeze(1).to(x.dtype) * self.value(x)
        return F.linear(x, w_key_u_2.t(), shift) + modulated @ u_12

    def _context(self, x: Tensor, outside: Optional[Tensor]) -> Tensor:
        """Global context G without keys, (B, C), at least float32."""
        with autocast_off(x):
            pooled = self.saliency_weights(x, outside) @ full_precision(x)
            context = torch.einsum('bhc,hdc->bhd', pooled, self._key_heads()).flatten(1)
            return context if self.key.bias is None else context + full_precision(self.key.bias)

    def _key_heads(self) -> Tensor:
        """W_K as (num_heads, head_dims, C), at least float32."""
        return full_precision(self.key.weight).unflatten(0, (self.num_heads, self.head_dims))

    def _score_directions(self) -> Tensor:
        """W_K,head saliency_head / sqrt(D) of each head, (num_heads, C)."""
        if self._is_precomputed:
            return self.score_directions
        # A key bias adds the same to all scores of a head: softmax ignores it.
        saliency = full_precision(self.saliency) * self.scale
        return torch.einsum('hdc,hd->hc', self._key_heads(), saliency)

    def _products(self) -> Tuple[Tensor, Tensor, Tensor]:
        """U_1 U_2 and W_K U_2, (C, C), and the constant (b_K + b_mix) U_2 + b_proj, (C,)."""
        if self._is_precomputed:
            return self.value_product, self.key_product, self.shift
        w_key, u_1, u_2 = (
            full_precision(linear.weight).t() for linear in (self.key, self.mix, self.proj)
        )
        passed = full_precision(self.mix.bias)  # what reaches U_2 besides the values
        if self.key.bias is not None:
            passed = passed + full_precision(self.key.bias)
        return u_1 @ u_2, w_key @ u_2, passed @ u_2 + full_precision(self.proj.bias)

    @torch.no_grad()
    def _precompute(self) -> None:
        deploy, self.deploy = self.deploy, False
        products = (self._score_directions(), *self._products())
        self.deploy = deploy
        for name, product in zip(PRODUCTS, products):
            setattr(self, name, product.to(self.key.weight.dtype).contiguous())


class DotProductAttention(nn.Module):
    """Standard multi-head attention by scaled dot products, the paper's comparison (Sec. 5.2, Fig. 4).

    ``softmax(Q K^T / sqrt(D)) V`` by PyTorch's
    :func:`~torch.nn.functional.scaled_dot_product_attention`: 4 N C^2 + 2 N^2 C
    multiply-adds. It has as many weights as :class:`KeyOnlyAttention` but for
    the C of the saliency, and the same signature.

    Args:
        embed_dims: Channels C of the input and the output.
        num_heads: Heads; must divide ``embed_dims``.
        qkv_bias: Whether queries, keys and values have a bias.

    Raises:
        ValueError: If ``num_heads`` does not divide ``embed_dims``, or one is below 1.
        TypeError: If one is no integer.
    """

    def __init__(self, embed_dims: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        _check_heads(embed_dims, num_heads)
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)
        self.proj = nn.Linear(embed_dims, embed_dims)

    def forward(self, x: Tensor, outside: Optional[Tensor] = None) -> Tensor:
        """Map tokens (B, N, C) to tokens (B, N, C), as :class:`KeyOnlyAttention` does."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        inside = None if outside is None else ~outside[:, None, None]
        out = F.scaled_dot_product_attention(query, key, value, inside)
        return self.proj(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f'embed_dims={self.embed_dims}, num_heads={self.num_heads}'


def _check_heads(embed_dims: int, num_heads: int) -> None:
    check_integer('embed_dims', embed_dims, 1)
    check_integer('num_heads', num_heads, 1)
    if embed_dims % num_heads:
        raise ValueError(
            f'num_heads must be a positive divisor of embed_dims, '
            f'got num_heads={num_heads} for embed_dims={embed_dims}'
        )

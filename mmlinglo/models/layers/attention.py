# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .precision import autocast_off, full_precision


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
    This literal order costs 4 N C^2 + 3 N C multiply-adds for N positions and C
    channels.

    Nothing between X and Y is non-linear but the softmax that makes G, so for
    each image, with all biases in b(G)::

        Y = X M(G) + b(G),  M(G) = W_V diag(G) U_1 U_2 + W_K U_2

    and G needs no keys: the scores are X (W_K,head saliency_head) up to a
    constant, and G_head = (sum_i A_i X_i) W_K,head + b_K,head. This folded order
    costs N C^2 + C^3 an image and 2 C^3 a batch, and is taken where that is below
    5/8 of the literal cost (:meth:`_folding_pays`): many positions, few channels.
    Both orders use the same parameters and agree to rounding, gradients included.

    Args:
        embed_dims: Channels C of the input and the output.
        num_heads: Heads; must divide ``embed_dims``.
        qkv_bias: Whether :attr:`key` and :attr:`value` have a bias (the name
            is the field's; there is no query). :attr:`mix` and :attr:`proj`
            always have one.

    Raises:
        ValueError: If ``num_heads`` does not divide ``embed_dims``.

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

        self.key = nn.Linear(embed_dims, embed_dims, bias=qkv_bias)
        self.value = nn.Linear(embed_dims, embed_dims, bias=qkv_bias)
        self.mix = nn.Linear(embed_dims, embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.saliency = nn.Parameter(torch.empty(num_heads, self.head_dims))
        nn.init.trunc_normal_(self.saliency, std=0.02)

    def saliency_weights(self, x: Tensor) -> Tensor:
        """Weight of every position in every head (Eq. 2).

        Args:
            x: Tokens X, (B, N, C).

        Returns:
            Weights A, (B, num_heads, N), which sum to 1 over the N positions;
            at least float32, since N may exceed the largest float16 number.
        """
        with autocast_off(x):
            # A key bias adds the same to all scores of a head: softmax ignores it.
            direction = torch.einsum(
                'hdc,hd->hc',
                self._heads(self.key.weight),
                full_precision(self.saliency) * self.scale,
            )
            return (full_precision(x) @ direction.t()).transpose(1, 2).softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention.

        Args:
            x: Tokens X, (B, N, C).

        Returns:
            Tokens Y, (B, N, C).
        """
        return self._forward_folded(x) if self._folding_pays(x) else self._forward_literal(x)

    def extra_repr(self) -> str:
        return f'embed_dims={self.embed_dims}, num_heads={self.num_heads}'

    @staticmethod
    def _folding_pays(x: Tensor) -> bool:
        """Whether B N C^2 + (B + 2) C^3 < 5/8 of 4 B N C^2; small products are slower a multiply-add."""
        batch_size, num_tokens, channels = x.shape
        return 3 * batch_size * num_tokens > 2 * (batch_size + 2) * channels

    def _forward_literal(self, x: Tensor) -> Tensor:
        key = self.key(x)
        with autocast_off(x):
            heads = full_precision(key).unflatten(-1, (self.num_heads, self.head_dims))
            logits = torch.einsum('bnhd,hd->bhn', heads, full_precision(self.saliency) * self.scale)
            context = torch.einsum('bhn,bnhd->bhd', logits.softmax(dim=-1), heads)
        context = context.flatten(1).unsqueeze(1).to(key.dtype)
        return self.proj(self.mix(context * self.value(x)) + key)

    def _forward_folded(self, x: Tensor) -> Tensor:
        weights = self.saliency_weights(x)
        # Small products, whose rounding would reach every position: at least float32.
        with autocast_off(x):
            w_key, w_value, u_1, u_2 = (
                full_precision(linear.weight).t()
                for linear in (self.key, self.value, self.mix, self.proj)
            )
            context = torch.einsum(
                'bhc,hdc->bhd', weights @ full_precision(x), self._heads(self.key.weight)
            ).flatten(1)
            passed = full_precision(self.mix.bias)  # what reaches U_2 besides the values
            if self.key.bias is not None:
                context = context + full_precision(self.key.bias)
                passed = passed + full_precision(self.key.bias)
            u_12 = u_1 @ u_2
            matrix = (context.unsqueeze(1) * w_value) @ u_12 + w_key @ u_2
            bias = passed @ u_2 + full_precision(self.proj.bias)
            if self.value.bias is not None:
                bias = bias + (context * full_precision(self.value.bias)) @ u_12
            bias = bias.expand(len(x), -1).unsqueeze(1)
        return torch.baddbmm(bias.to(x.dtype), x, matrix.to(x.dtype))

    def _heads(self, weight: Tensor) -> Tensor:
        """Split (C, C_in) into (num_heads, head_dims, C_in), at least float32."""
        return full_precision(weight).unflatten(0, (self.num_heads, self.head_dims))


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
        ValueError: If ``num_heads`` does not divide ``embed_dims``.
    """

    def __init__(self, embed_dims: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        _check_heads(embed_dims, num_heads)
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)
        self.proj = nn.Linear(embed_dims, embed_dims)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to tokens (B, N, C)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f'embed_dims={self.embed_dims}, num_heads={self.num_heads}'


def _check_heads(embed_dims: int, num_heads: int) -> None:
    if num_heads < 1 or embed_dims % num_heads:
        raise ValueError(
            f'num_heads must be a positive divisor of embed_dims, '
            f'got num_heads={num_heads} for embed_dims={embed_dims}'
        )

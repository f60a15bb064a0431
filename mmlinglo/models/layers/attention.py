# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import torch
from torch import Tensor, nn


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
    The cost is 4 N C^2 + 3 N C multiply-adds for N positions and C channels.

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
        if num_heads < 1 or embed_dims % num_heads:
            raise ValueError(
                f'num_heads must be a positive divisor of embed_dims, '
                f'got num_heads={num_heads} for embed_dims={embed_dims}'
            )
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

    def saliency_weights(self, key: Tensor) -> Tensor:
        """Weight of every position in every head (Eq. 2).

        Args:
            key: Keys K, (B, N, C).

        Returns:
            Weights A, (B, num_heads, N), which sum to 1 over the N positions;
            float32 for half-precision keys, since N may exceed the largest
            float16 number, else of the dtype of ``key``.
        """
        key, saliency = self._heads(key), self._full(self.saliency)
        with torch.autocast(key.device.type, enabled=False):
            logits = torch.einsum('bnhd,hd->bhn', key, saliency * self.scale)
            return logits.softmax(dim=-1)

    def global_context(self, key: Tensor) -> Tensor:
        """Sum of the keys by their weights, heads concatenated (Eq. 3).

        Args:
            key: Keys K, (B, N, C).

        Returns:
            Context G, (B, C), in the dtype of ``key``.
        """
        weights = self.saliency_weights(key)
        with torch.autocast(key.device.type, enabled=False):
            context = torch.einsum('bhn,bnhd->bhd', weights, self._heads(key))
        return context.flatten(1).to(key.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention.

        Args:
            x: Tokens X, (B, N, C).

        Returns:
            Tokens Y, (B, N, C).
        """
        key = self.key(x)
        context = self.global_context(key).unsqueeze(1)
        return self.proj(self.mix(context * self.value(x)) + key)

    def extra_repr(self) -> str:
        return f'embed_dims={self.embed_dims}, num_heads={self.num_heads}'

    def _heads(self, key: Tensor) -> Tensor:
        """Split (B, N, C) into (B, N, num_heads, head_dims), at least float32."""
        return self._full(key).unflatten(-1, (self.num_heads, self.head_dims))

    @staticmethod
    def _full(x: Tensor) -> Tensor:
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from .. import network
from ..arguments import check_integer
from . import gpu
from .precision import autocast_off, full_precision
from .seam import Rewriting

# Whether code that is compiled may ask if a size is known. At 2.5 it may not, from 2.9 on it may.
SIZES_CAN_BE_ASKED = TorchVersion(torch.__version__) >= (2, 9)


class KeyOnlyAttention(Rewriting, network.KeyOnlyAttention, plain=True):
    r"""Key-only attention (Sec. 3.1) as one product of the tokens with a small matrix.

    Nothing between X and Y is non-linear but the softmax that makes the context G. The scores
    are X (W_K,head saliency_head) up to a constant, which softmax ignores; G_head =
    (sum_i A_i X_i) W_K,head + b_K,head; and with G the rest is an affine map of X::

        M(G) = W_V diag(G) U_1 U_2 + W_K U_2
        b(G) = ((G * b_V) U_1 + b_K + b_mix) U_2 + b_proj
        Y    = X M(G) + b(G)                     N C^2 + min(2, 1 + 2 / B) C^3 multiply-adds

    an image in a batch of B, where the definition takes 4 N C^2. The matrices are small, and
    cost more time a multiply-add, so it is taken below 5/8 of the definition's count. Where a
    graph is captured for sizes that are not known, it is always taken. On a GPU it is taken under
    autocast only, and of larger maps.

    Of smaller maps the context alone is rewritten: it is standard attention of one query a head,
    the saliency vector, to the keys, for which PyTorch has a fused kernel. That kernel has no
    second derivative, so on a CPU it is taken without gradients only.

    Example:
        >>> attn = KeyOnlyAttention(embed_dims=64, num_heads=2)
        >>> attn(torch.rand(1, 3136, 64)).shape
        torch.Size([1, 3136, 64])
    """

    parts = (
        ('key', nn.Linear),
        ('value', nn.Linear),
        ('mix', nn.Linear),
        ('proj', nn.Linear),
        ('softmax', nn.Softmax),
    )

    def __init__(self, embed_dims: int, num_heads: int, qkv_bias: bool = True) -> None:
        check_integer('embed_dims', embed_dims, 1)
        check_integer('num_heads', num_heads, 1)
        super().__init__(embed_dims, num_heads, qkv_bias)

    def saliency_weights(self, x: Tensor) -> Tensor:
        """Weight of every position in every head (Eq. 2): tokens (B, N, C) to (B, num_heads, N).

        They sum to 1 over the positions and are float32 at least, since N may exceed the
        largest float16 number.
        """
        with autocast_off(x):
            return self.softmax((full_precision(x) @ self._directions().t()).transpose(1, 2))

    def rewrite(self, x: Tensor) -> Optional[Tensor]:
        batch_size, num_tokens, channels = x.shape
        if self.mix.bias is None or self.proj.bias is None or self.softmax.dim != -1:
            return None
        few_images = _is_known(batch_size <= 2)
        products = 2 * batch_size if few_images else batch_size + 2
        if _is_known(3 * batch_size * num_tokens <= 2 * products * channels):
            return self._attend_by_queries(x)
        on_gpu = gpu.is_usable(x)
        if on_gpu:
            # By what is launched and moved forward and backward: without autocast up to 1.7 times
            # the definition's launches, and near that border more bytes, too.
            if not torch.is_autocast_enabled(x.device.type) or _is_known(
                2 * batch_size * num_tokens < 3 * (products + 1) * channels
            ):
                return self._attend_by_queries(x)
            x = x.to(torch.get_autocast_dtype(x.device.type))
        # In float32 at least: an error of the matrix would reach every position.
        with autocast_off(x):
            if on_gpu:
                queries = self._directions().to(x.dtype).expand(batch_size, 1, -1, -1)
                tokens = x.unsqueeze(1)
                pooled = F.scaled_dot_product_attention(queries, tokens, tokens, scale=1.0)
                pooled = full_precision(pooled.squeeze(1))
            else:
                pooled = self.saliency_weights(x) @ full_precision(x)
            context = torch.einsum('bhc,hdc->bhd', pooled, self._key_heads()).flatten(1)
            w_key, w_value, u_1, u_2 = (
                full_precision(linear.weight).t()
                for linear in (self.key, self.value, self.mix, self.proj)
            )
            shift = full_precision(self.mix.bias)
            if self.key.bias is not None:
                context = context + full_precision(self.key.bias)
                shift = shift + full_precision(self.key.bias)
            modulated = context.unsqueeze(1) * w_value
            if few_images:
                matrix = (modulated @ u_1 + w_key) @ u_2
            else:
                matrix = modulated @ (u_1 @ u_2) + w_key @ u_2
            if self.value.bias is not None:
                shift = shift + (context * full_precision(self.value.bias)) @ u_1
            bias = (shift @ u_2 + full_precision(self.proj.bias)).expand(batch_size, -1)
        return torch.baddbmm(bias.unsqueeze(1).to(x.dtype), x, matrix.to(x.dtype))

    def _attend_by_queries(self, x: Tensor) -> Optional[Tensor]:
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and not gpu.is_usable(x)):
            return None
        key, value = self.key(x), self.value(x)
        heads = key.unflatten(-1, self.saliency.shape).transpose(1, 2)
        queries = self.saliency.to(heads.dtype).unsqueeze(1).expand(len(x), -1, -1, -1)
        context = F.scaled_dot_product_attention(queries, heads, heads).flatten(1)
        return self.proj(self.mix(context.unsqueeze(1) * value) + key)

    def _directions(self) -> Tensor:
        """What a token's score in each head is the product with, (num_heads, C)."""
        saliency = full_precision(self.saliency) / self.saliency.shape[1] ** 0.5
        return torch.einsum('hdc,hd->hc', self._key_heads(), saliency)

    def _key_heads(self) -> Tensor:
        """W_K as (num_heads, D, C), in float32 at least."""
        return full_precision(self.key.weight).unflatten(0, self.saliency.shape)


def _is_known(condition: bool) -> bool:
    """Whether it is true, whatever the sizes are that a captured graph leaves free."""
    if torch.compiler.is_compiling():
        if not SIZES_CAN_BE_ASKED:
            return False
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(condition)
    return not torch.jit.is_tracing() and bool(condition)

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The paper's formulas in plain float64 NumPy, written from its text and not from the package."""

import numpy as np


def key_only_attention(x, w_key, b_key, w_value, b_value, saliency, w_mix, b_mix, w_proj, b_proj):
    """Eq. 2-4 for one image. x (N, C); weights (C_in, C_out); saliency (heads, C / heads)."""
    num_heads, head_dims = saliency.shape
    key = x @ w_key + b_key
    value = x @ w_value + b_value
    context = np.zeros(x.shape[1])
    for head in range(num_heads):
        columns = slice(head * head_dims, (head + 1) * head_dims)
        logits = key[:, columns] @ saliency[head] / np.sqrt(head_dims)
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        for position, weight in enumerate(weights):
            context[columns] += weight * key[position, columns]
    return ((context * value) @ w_mix + b_mix + key) @ w_proj + b_proj


def depthwise_conv3x3(x, kernel, bias=0.0):
    """x (B, C, H, W), kernel (C, 3, 3), zero padding of 1; as cross-correlation."""
    _, _, height, width = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.zeros_like(x)
    for row in range(3):
        for column in range(3):
            window = padded[:, :, row : row + height, column : column + width]
            out += kernel[:, row, column][None, :, None, None] * window
    return out + np.reshape(bias, (1, -1, 1, 1))


def batch_norm(x, gamma, beta, mean, var, eps=1e-5):
    shape = (1, -1, 1, 1)
    scale = gamma / np.sqrt(var + eps)
    return (x - mean.reshape(shape)) * scale.reshape(shape) + beta.reshape(shape)


def rp_cpe(x, branches, skip, use_batch_statistics):
    """Fig. 2b. branches: dicts of kernel (C, 3, 3), gamma, beta, mean, var (C,)."""
    out = x.copy() if skip else np.zeros_like(x)
    for branch in branches:
        y = depthwise_conv3x3(x, branch['kernel'])
        mean, var = branch['mean'], branch['var']
        if use_batch_statistics:
            mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3))
        out += batch_norm(y, branch['gamma'], branch['beta'], mean, var)
    return out


def linear_parameters(channels_in, channels_out):
    return channels_in * channels_out + channels_out


def linglo_parameters(embed_dims, depths, num_heads, mlp_ratio, num_classes, deploy):
    """Parameters of a classifier, added up by hand from paper Sec. 3.3 and 3.4."""
    total, previous = 0, 3
    for stage, (c, depth, heads, ratio) in enumerate(zip(embed_dims, depths, num_heads, mlp_ratio)):
        kernel = 7 if stage == 0 else 3
        total += previous * c * kernel**2 + c + 2 * c  # convolution, LayerNorm
        hidden = c * ratio
        attention = 4 * linear_parameters(c, c) + heads * (c // heads)
        encoding = 9 * hidden + hidden if deploy else 4 * (9 * hidden + 2 * hidden)
        ffn = linear_parameters(c, hidden) + encoding + linear_parameters(hidden, c)
        total += depth * (attention + ffn + 4 * c)
        previous = c
    return total + 2 * previous + linear_parameters(previous, num_classes)

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Autocorrelation of each channel of a map at lags of up to two rows and two columns."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

CHUNK_ELEMENTS = 2**21  # of a map at a time on a CPU, for its cache; 8 MiB in float32


def autocorrelation(x: Tensor, centre: Tensor) -> Tensor:
    """Sums over s of (x(s) - centre) (x(s + d) - centre), both inside the map.

    It is the weight gradient of a depth-wise convolution of x for the output gradient x. oneDNN
    has fast ones for kernels of up to three columns. They give lags of -1 to 1 columns; those of
    two are lags of one pair of columns, and pairs of columns as channels are a view.

    Args:
        x: Maps, (B, H, W, C), of any strides.
        centre: (C,), float32 or wider.

    Returns:
        (C, 5, 5) for d from (-2, -2) to (2, 2), in the dtype of ``centre``.
    """
    images = len(x)
    if x.device.type == 'cpu' and images:
        images = CHUNK_ELEMENTS * images // x.numel()
    first, *others = (_autocorrelate(chunk - centre) for chunk in x.split(max(images, 1)))
    return sum(others, start=first)


def _autocorrelate(x: Tensor) -> Tensor:
    x = x.contiguous()
    batch_size, height, width, channels = x.shape
    near = _lags(x)
    pairs = F.pad(x, (0, 0, 0, 1)) if width % 2 else x
    far = _lags(pairs.view(batch_size, height, -1, 2 * channels))
    far = far.view(2, channels, 5, 3).sum(0)
    return torch.cat([far[..., :1], near, far[..., 2:]], dim=-1)


def _lags(x: Tensor) -> Tensor:
    """Lags of -2 to 2 rows and -1 to 1 columns of (B, H, W, C), as (C, 5, 3)."""
    channels = x.shape[-1]
    x = x.permute(0, 3, 1, 2)
    shape = (channels, 1, 5, 3)
    return conv2d_weight(x, shape, x, padding=(2, 1), groups=channels).squeeze(1)

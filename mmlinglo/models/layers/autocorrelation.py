# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Autocorrelation of each channel of a map at lags of up to two rows and two columns."""

import logging
from functools import cache

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor

from .chunking import image_chunks


def autocorrelation(x: Tensor, centre: Tensor) -> Tensor:
    """Sums over s of (x(s) - centre) (x(s + d) - centre), both inside the map.

    By a Triton kernel on a GPU where Triton works, which reads x once and keeps
    nothing; else by PyTorch's convolutions.

    Args:
        x: Maps, (B, H, W, C), contiguous for the kernel, else of any strides.
        centre: (C,), float32 or wider.

    Returns:
        (C, 5, 5) for d from (-2, -2) to (2, 2), in the dtype of ``centre``.
    """
    if x.is_cuda and x.dtype != torch.float64 and x.is_contiguous() and _triton_works(x.device):
        from .autocorrelation_triton import autocorrelation_triton

        return autocorrelation_triton(x, centre)
    return sum(_autocorrelation_eager(x[chunk], centre) for chunk in image_chunks(x))


def _autocorrelation_eager(x: Tensor, centre: Tensor) -> Tensor:
    """It is the weight gradient of a depth-wise convolution of x for the output gradient x.

    oneDNN has fast ones for kernels of up to three columns. They give lags of -1 to 1 columns; those of
    two are lags of one pair of columns, and pairs of columns as channels are a view.
    """
    x = (x - centre).contiguous()
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
    return torch.nn.grad.conv2d_weight(x, shape, x, padding=(2, 1), groups=channels).squeeze(1)


@cache
def _triton_works(device: torch.device) -> bool:
    """Whether the kernel compiles on this machine, which takes a C compiler too, and is right."""
    try:
        from .autocorrelation_triton import autocorrelation_triton

        x = torch.arange(2 * 3 * 5 * 4, device=device, dtype=torch.float32).sin().view(2, 3, 5, 4)
        centre = x.mean((0, 1, 2))
        torch.testing.assert_close(
            autocorrelation_triton(x, centre),
            _autocorrelation_eager(x, centre),
            rtol=1e-3,
            atol=1e-4,
        )
    except Exception as error:
        message = str(error).splitlines() or ['']
        print_log(
            "mmlinglo: no Triton kernel for the training of the positional encodings, PyTorch's "
            f'convolutions are used instead ({type(error).__name__}: {message[0]})',
            logger='current',
            level=logging.WARNING,
        )
        return False
    return True

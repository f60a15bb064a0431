# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
r"""Mean and covariance of the 3x3 patches of a map, channel by channel.

All that batch norm needs to know of any depth-wise 3x3 convolution's output.

Offsets in a patch and lags between positions are (row, column) pairs. With x
zero outside the map, and sums over the positions t of the map::

    m_k = 1/n sum_t x(t + k),  S_kj = 1/n sum_t x(t + k) x(t + j),  k, j in {-1, 0, 1}^2

Were the sums over all t, S_kj would be the autocorrelation R(j - k) with lags up
to 2. The map's border takes little away: x(s) x(s + j - k) is missing where
s - k is not in the map, which, since s + j - k is, happens only in the first
(last) row when k and j both point down (up), and in columns likewise. So::

    n S_kj = R(j - k) - Row(j - k) - Column(j - k) + Corner

with autocorrelations of border rows and columns, and squares of corners where
both were taken away (:func:`_assembly` has the terms of each pair). The sums run over
x minus its mean, so that large means do not cancel; what the mean contributes is
known from the geometry.
"""

from functools import lru_cache
from itertools import product
from typing import Any, Dict, List, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gpu
from .autocorrelation import autocorrelation
from .precision import autocast_off, full_precision

OFFSETS = list(product((-1, 0, 1), (-1, 0, 1)))
LAGS = list(product(range(-2, 3), range(-2, 3)))


def patch_moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and covariance of the zero-padded 3x3 patches of each channel, differentiable.

    Args:
        x: Maps, (B, C, H, W), channels-last ones without a copy in that layout.

    Returns:
        Mean (C, 9) and covariance (C, 9, 9) over the B * H * W patches; a
        patch's entries in the order of a flattened 3x3 kernel. float32 for half
        precision inputs.
    """
    return _PatchMoments.apply(x)


class _PatchMoments(torch.autograd.Function):
    """Keeps nothing but ``x`` for the backward pass, which a convolution after it keeps anyway."""

    @staticmethod
    def forward(x: Tensor) -> Tuple[Tensor, Tensor]:
        with autocast_off(x):
            if gpu.is_usable(x):
                return gpu.patch_moments(x)
            maps = x.permute(0, 2, 3, 1)
            centre = full_precision(maps).mean((0, 1, 2))
            return _moments(maps, centre, autocorrelation(maps, centre))

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Tensor], output: Tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[0])

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_covariance: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        with autocast_off(x):
            # The kernels have no derivative of their own; what follows has.
            if gpu.is_usable(x) and not torch.is_grad_enabled():
                return gpu.patch_moments_backward(x, mean, grad_mean, grad_covariance)
            return _moments_gradient(full_precision(x), mean, grad_mean, grad_covariance).to(
                x.dtype
            )


def _moments(x: Tensor, centre: Tensor, correlation: Tensor) -> Tuple[Tensor, Tensor]:
    """Of maps (B, H, W, C), with their mean (C,) and the autocorrelation (C, 5, 5) of x - centre."""
    height, width = x.shape[1:3]
    n = x.numel() // x.shape[3]
    assembly, overlap_mean, overlap_pair = _keep_like(centre, _TABLES)
    known = [torch.tensor(each, dtype=torch.float64) for each in _inside_moments(height, width)]
    inside_mean, inside_covariance = _keep_like(centre, known, height, width)
    second = _products(x, centre, correlation) @ assembly / n

    # First moments of x - centre where a shifted map overlaps the map, see _overlap.
    sums = _overlap_sums(x, centre) / n
    mean = sums[:, overlap_mean]
    cross = centre.view(-1, 1, 1) * (
        sums[:, overlap_pair].view(-1, 9, 9) - mean.unsqueeze(2) * inside_mean
    )
    covariance = (
        second.view(-1, 9, 9)
        - mean.unsqueeze(1) * mean.unsqueeze(2)
        + cross
        + cross.transpose(1, 2)
        + centre.square().view(-1, 1, 1) * inside_covariance
    )
    return mean + centre.unsqueeze(1) * inside_mean, covariance


def _products(x: Tensor, centre: Tensor, correlation: Tensor) -> Tensor:
    """Of x - centre, (B, H, W, C), all sums of products that S is made of: (C, 49).

    R at 25 lags, first and last row's at 5 lags, first and last column's, squares of 4 corners.
    """
    rows = torch.stack([x[:, 0], x[:, -1]]) - centre  # (2, B, W, C)
    columns = torch.stack([x[:, :, 0], x[:, :, -1]]) - centre
    border = torch.stack([_line_autocorrelation(lines) for lines in (rows, columns)])
    border = torch.cat([border[:, 1:].flip(1), border], dim=1).permute(3, 0, 2, 1)  # (C, 2, 2, 5)
    corners = torch.stack([rows[:, :, 0], rows[:, :, -1]], dim=2).square().sum(1)  # (2, 2, C)
    return torch.cat([correlation.flatten(1), border.flatten(1), corners.flatten(0, 1).t()], dim=1)


def _line_autocorrelation(lines: Tensor) -> Tensor:
    """Lines (2, B, L, C) to their autocorrelation at lags 0, 1, 2, (3, 2, C)."""
    length = lines.shape[2]
    return torch.stack(
        [(lines[:, :, : max(length - lag, 0)] * lines[:, :, lag:]).sum((1, 2)) for lag in range(3)]
    )


def _overlap(k: int, j: int) -> int:
    """How many lines the sum of x(t + k) 1(t + j) leaves out of x: first ones, or (negative) last."""
    return max(0, k, k - j) - max(0, -k, j - k)


_OVERLAPS = (-2, -1, 0, 1, 2)


def _overlap_sums(x: Tensor, centre: Tensor) -> Tensor:
    """Sums of x - centre, (B, H, W, C), without some border lines: (C, 25).

    Rows and columns are left out as ``_OVERLAPS`` says. The sum of all is zero.
    """
    rows = torch.stack([(x[:, _lines(o)] - centre).sum((0, 1)) for o in _OVERLAPS])  # (5, W, C)
    columns = torch.stack([(x[:, :, _lines(o)] - centre).sum((0, 1, 2)) for o in _OVERLAPS])
    corners = torch.stack([rows[:, _lines(o)].sum(1) for o in _OVERLAPS], dim=1)
    return (corners - rows.sum(1).unsqueeze(1) - columns).flatten(0, 1).t()


def _lines(overlap: int) -> slice:
    return slice(None, overlap) if overlap >= 0 else slice(overlap, None)


@lru_cache(maxsize=64)
def _inside_moments(height: int, width: int) -> Tuple[List[float], List[List[float]]]:
    """Mean (9,) and covariance (9, 9) of the patches of a map that is 1 inside.

    Not as tensors: those that a tensor subclass makes are not for others.
    """

    def share(k: Tuple[int, int], j: Tuple[int, int]) -> float:
        left_out = [abs(_overlap(a, b)) for a, b in zip(k, j)]
        return max(height - left_out[0], 0) * max(width - left_out[1], 0) / (height * width)

    mean = [share(k, (0, 0)) for k in OFFSETS]
    return mean, [
        [share(k, j) - m * n for j, n in zip(OFFSETS, mean)] for k, m in zip(OFFSETS, mean)
    ]


def _moments_gradient(
    x: Tensor, mean: Tensor, grad_mean: Tensor, grad_covariance: Tensor
) -> Tensor:
    """Gradient of maps (B, C, H, W) from those of mean (C, 9) and covariance (C, 9, 9)."""
    channels = x.shape[1]
    n = x.numel() // channels
    # covariance = S - m m^T
    both = grad_covariance + grad_covariance.transpose(1, 2)
    shift = (grad_mean - (both @ mean.unsqueeze(-1)).squeeze(-1)).view(-1, 3, 3) / n
    assembly, *_ = _keep_like(mean, _TABLES)
    grad = grad_covariance.reshape(channels, 81) @ assembly.t() / n  # vmap has no flatten()
    lags, border, corners = grad.split([25, 20, 4], dim=1)
    border, corners = border.view(-1, 2, 2, 5), 2 * corners.view(-1, 2, 2)

    lags = _symmetric(lags.reshape(-1, 1, 5, 5))
    out = F.conv2d(x, lags, shift.sum((1, 2)), padding=2, groups=channels)
    for i, line in enumerate((0, -1)):
        offset = 2 - 2 * i  # with offset -1 (1) a patch reaches beyond the first (last) line
        row, column = x[:, :, line].unsqueeze(2), x[:, :, :, line].unsqueeze(3)
        row_lags = _symmetric(border[:, 0, i].reshape(-1, 1, 1, 5))
        column_lags = _symmetric(border[:, 1, i].reshape(-1, 1, 5, 1))
        row = F.conv2d(row, row_lags, padding=(0, 2), groups=channels)
        column = F.conv2d(column, column_lags, padding=(2, 0), groups=channels)
        out[:, :, line] += row.squeeze(2) - shift[:, offset].sum(1).view(-1, 1)
        out[:, :, :, line] += column.squeeze(3) - shift[:, :, offset].sum(1).view(-1, 1)
        for j, other in enumerate((0, -1)):
            corner = corners[:, i, j] * x[:, :, line, other]
            out[:, :, line, other] += corner + shift[:, offset, 2 - 2 * j]
    return out


def _symmetric(kernel: Tensor) -> Tensor:
    # R(d) = sum x(s) x(s + d): its derivative at s is x(s + d) + x(s - d).
    return kernel + kernel.flip(2, 3)


def _assembly() -> Tensor:
    """Matrix (49, 81) from :func:`_products` to n S."""
    matrix = torch.zeros(5 * 5 + 2 * 2 * 5 + 2 * 2, 9, 9)
    for (row, k), (column, j) in product(enumerate(OFFSETS), repeat=2):
        entry = matrix[:, row, column]
        lag = (j[0] - k[0], j[1] - k[1])
        entry[LAGS.index(lag)] = 1
        line = [0 if offset == 1 else 1 for offset in k]  # first or last
        if k[0] == j[0] != 0:
            entry[25 + 5 * line[0] + lag[1] + 2] = -1
        if k[1] == j[1] != 0:
            entry[35 + 5 * line[1] + lag[0] + 2] = -1
        if k == j and 0 not in k:
            entry[45 + 2 * line[0] + line[1]] = 1
    return matrix.flatten(1)


def _overlap_index(k: Tuple[int, int], j: Tuple[int, int]) -> int:
    return LAGS.index((_overlap(k[0], j[0]), _overlap(k[1], j[1])))


_TABLES = (
    _assembly(),
    torch.tensor([_overlap_index(k, (0, 0)) for k in OFFSETS]),
    torch.tensor([_overlap_index(k, j) for k, j in product(OFFSETS, OFFSETS)]),
)
_ON_DEVICES: Dict[Any, Any] = {}


def _keep_like(like: Tensor, tables: Sequence[Tensor], *sizes: int) -> Sequence[Tensor]:
    """Tables for maps of the sizes on the device of ``like``; those of real numbers in its type.

    They stay on a GPU: a copy would be one in each step.
    """

    def move() -> Sequence[Tensor]:
        dtypes = [like.dtype if t.is_floating_point() else t.dtype for t in tables]
        return [table.to(like.device, dtype) for table, dtype in zip(tables, dtypes)]

    if like.device.type == 'cpu' or torch.compiler.is_compiling():
        return move()
    # Tensors without data belong to their mode.
    mode = getattr(like, 'fake_mode', None)
    kept = _ON_DEVICES if mode is None else mode.__dict__.setdefault('mmlinglo_constants', {})
    key = sizes, like.dtype, like.device
    if key not in kept:
        kept[key] = move()
    return kept[key]

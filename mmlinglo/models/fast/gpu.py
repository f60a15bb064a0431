# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Positional encodings in training on a GPU: the operators around the kernels of :mod:`.kernels`.

Each operator is one of PyTorch, with a function for tensors without data. So it counts as one
operation and can be compiled. Maps are (B, C, H, W) in float16, bfloat16 or float32, with any
strides; statistics and what is computed of weights are float32.
"""

from functools import lru_cache
from importlib.util import find_spec
from itertools import product
from typing import Any, List, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from .precision import autocast_off
from .synchronize import Group, gather_moments, share_gradients

SLOTS = 54
"""Sums of x - centre and of its products, for each channel.

Products at 13 lags, (row, column) from (0, 0) to (2, 2), as the others follow by symmetry; down the
first and the last column at lags of 0 to 2 rows (13 to 18). The sum of all (19) and of the first,
second, last but one and last column (20 to 23). Each such row, followed by its crossings with such
columns (24 to 43). In the first (44) and the last row (49), products at lags of 0 to 2 columns,
and the squares of the corners.
"""
CHANNELS = 16  # of a program whose work does not grow with the map
ROWS = 48  # of a program, at most
WARPS = 8
HAS_TRITON = find_spec('triton') is not None  # comes with PyTorch for NVIDIA's GPUs


def is_usable(x: Tensor) -> bool:
    """Whether the kernels do the work on ``x``."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    return x.device.type == 'cuda' and x.dtype in dtypes and x.numel() > 0 and HAS_TRITON


def _lag_slot(row: int, column: int) -> int:
    row, column = max((row, column), (-row, -column))
    return column if row == 0 else 5 * row + column


def _left_out(k: int, j: int) -> List[int]:
    """Lines, of the first, second, last but one and last, that sum x(t + k) 1(t + j) leaves out."""
    return list(range(max(0, k, k - j))) + list(range(4 - max(0, -k, j - k), 4))


def _sum_of_kept(out: Tensor, k: Tuple[int, int], j: Tuple[int, int]) -> None:
    """The sum over t of x(t + k) where t + j is in the map, from the sums in the slots."""
    rows, columns = (_left_out(a, b) for a, b in zip(k, j))
    out[19] += 1
    for column in columns:
        out[20 + column] -= 1
    for row in rows:
        out[24 + 5 * row] -= 1
        for column in columns:
            out[25 + 5 * row + column] += 1


@lru_cache(maxsize=16)
def _tables(device: torch.device) -> Tuple[Tensor, Tensor]:
    """Constants of the kernels, copied to a device once.

    Matrices (5, 64, 128) between slots and pairs of a patch's entries k and j: the second moments;
    the sums of x(t + k) where t + j is in the map, and the other way round; the means at k; those
    at j; the shifts of ``moments_backward``. And (6, 128), how many rows and columns of a map of
    ones are lost at k, at j and at both.
    """
    tables = torch.zeros(5, 64, 128)
    left_out = torch.zeros(6, 128, dtype=torch.int32)
    offsets = list(product((-1, 0, 1), (-1, 0, 1)))
    for pair, (k, j) in enumerate(product(offsets, offsets)):
        second, cross, mean_k, mean_j, shifts = tables[:, :, pair]
        row_lag, column_lag = j[0] - k[0], j[1] - k[1]
        second[_lag_slot(row_lag, column_lag)] += 1
        # What an offset of 1 (-1) leaves out is in the first (last) line, which is line 0 (1).
        if k[0] == j[0] != 0:
            second[44 + 5 * (k[0] < 0) + abs(column_lag)] -= 1
        if k[1] == j[1] != 0:
            second[13 + 3 * (k[1] < 0) + abs(row_lag)] -= 1
        if k == j and 0 not in k:
            second[47 + 5 * (k[0] < 0) + (k[1] < 0)] += 1
        for a, b in ((k, j), (j, k)):
            _sum_of_kept(cross, a, b)
        _sum_of_kept(mean_k, k, (0, 0))
        _sum_of_kept(mean_j, j, (0, 0))
        shifts[19] = 1
        if k[0]:
            shifts[20 + (k[0] < 0)] = -1
        if k[1]:
            shifts[22 + (k[1] < 0)] = -1
        if 0 not in k:
            shifts[24 + 2 * (k[0] < 0) + (k[1] < 0)] = 1
        for axis in (0, 1):
            left_out[axis, pair] = abs(k[axis])
            left_out[2 + axis, pair] = abs(j[axis])
            left_out[4 + axis, pair] = len(_left_out(k[axis], j[axis]))
    return tables.to(device), left_out.to(device)


class _Tiling:
    """How programs share a map, and what all kernels that read it want to know."""

    def __init__(self, x: Tensor, images: int = 1) -> None:
        self.batch, self.channels, self.height, self.width = x.shape
        self.block_w = min(32, _next_power_of_2(self.width))
        self.block_c = 512 // self.block_w if self.block_w > 4 else 64
        num_strips = -(-self.height // ROWS)
        self.rows = -(-self.height // num_strips)
        self.images = max(1, images // self.height)
        chunks = -(-self.width // self.block_w)
        self.strips_and_chunks = num_strips, chunks
        self.programs = -(-self.batch // self.images) * num_strips * chunks
        self.grid = self.programs, -(-self.channels // self.block_c)
        self.sizes = self.batch, self.height, self.width, self.channels


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _tile(x: Tensor) -> _Tiling:
    """For sums: small maps share a program, so that there are few partial sums."""
    return _Tiling(x, images=32)


def _strides(x: Tensor) -> Tuple[int, int, int, int]:
    batch, channel, row, column = x.stride()
    return batch, channel, row, column


@custom_op('mmlinglo::product_sums', mutates_args=())
def product_sums(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Partial sums (programs, 54, C), see :data:`SLOTS`, and the centre (C,)."""
    from . import kernels

    tile = _tile(x)
    out = x.new_empty(tile.programs, SLOTS, tile.channels, dtype=torch.float32)
    centre = x.new_empty(tile.channels, dtype=torch.float32)
    with torch.cuda.device_of(x):
        kernels.product_sums[tile.grid](
            x, centre, out, *tile.sizes, *_strides(x),
            tile.images, tile.rows, *tile.strips_and_chunks,
            BLOCK_W=tile.block_w, BLOCK_C=tile.block_c, num_warps=WARPS,
        )  # fmt: skip
    return out, centre


@product_sums.register_fake
def _(x: Tensor) -> Tuple[Tensor, Tensor]:
    tile = _tile(x)
    out = x.new_empty(tile.programs, SLOTS, tile.channels, dtype=torch.float32)
    return out, x.new_empty(tile.channels, dtype=torch.float32)


@custom_op('mmlinglo::moments', mutates_args=())
def moments(sums: Tensor, centre: Tensor, batch: int, height: int, width: int) -> Tuple[Tensor, Tensor]:  # fmt: skip
    """Mean (C, 9) and covariance (C, 9, 9) of the patches, from the sums (54, C)."""
    from . import kernels

    channels = len(centre)
    mean, covariance = sums.new_empty(channels, 9), sums.new_empty(channels, 9, 9)
    with torch.cuda.device_of(sums):
        kernels.moments[(-(-channels // CHANNELS),)](
            sums, centre, *_tables(sums.device), mean, covariance,
            float(batch * height * width), height, width, channels, BLOCK_C=CHANNELS, num_warps=WARPS,
        )  # fmt: skip
    return mean, covariance


@moments.register_fake
def _(sums: Tensor, centre: Tensor, *_: int) -> Tuple[Tensor, Tensor]:
    return sums.new_empty(len(centre), 9), sums.new_empty(len(centre), 9, 9)


@custom_op('mmlinglo::fuse', mutates_args=())
def fuse(
    params: Tensor,
    mean: Tensor,
    covariance: Tensor,
    eps: float,
    unbias: float,
    skip: bool,
    dtype: torch.dtype,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Kernel (C, 1, 3, 3), bias (C,) and statistics (2, branches, C) of the branches."""
    from . import kernels

    channels, branches = len(mean), params.shape[1] // 11
    kernel = mean.new_empty(channels, 1, 3, 3, dtype=dtype)
    bias = mean.new_empty(channels, dtype=dtype)
    statistics = mean.new_empty(2, branches, channels)
    with torch.cuda.device_of(mean):
        kernels.fuse[(-(-channels // CHANNELS),)](
            params, mean, covariance, kernel, bias, statistics, channels, eps, unbias,
            BRANCHES=branches, SKIP=skip, BLOCK_C=CHANNELS, num_warps=WARPS,
        )  # fmt: skip
    return kernel, bias, statistics


@fuse.register_fake
def _(params: Tensor, mean: Tensor, _c: Tensor, _e: float, _u: float, _s: bool, dtype: torch.dtype) -> Tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    channels, branches = len(mean), params.shape[1] // 11
    kernel = mean.new_empty(channels, 1, 3, 3, dtype=dtype)
    bias = mean.new_empty(channels, dtype=dtype)
    return kernel, bias, mean.new_empty(2, branches, channels)


@custom_op('mmlinglo::weight_sums', mutates_args=())
def weight_sums(grad: Tensor, x: Tensor) -> Tensor:
    """Partial sums (programs, 10, C) of the gradients of a depth-wise 3x3 kernel and of a bias."""
    from . import kernels

    tile = _tile(x)
    out = x.new_empty(tile.programs, 10, tile.channels, dtype=torch.float32)
    with torch.cuda.device_of(x):
        kernels.weight_sums[tile.grid](
            grad, x, out, *tile.sizes, *_strides(grad), *_strides(x),
            tile.images, tile.rows, *tile.strips_and_chunks,
            BLOCK_W=tile.block_w, BLOCK_C=tile.block_c, num_warps=WARPS,
        )  # fmt: skip
    return out


@weight_sums.register_fake
def _(_: Tensor, x: Tensor) -> Tensor:
    tile = _tile(x)
    return x.new_empty(tile.programs, 10, tile.channels, dtype=torch.float32)


@custom_op('mmlinglo::fuse_backward', mutates_args=())
def fuse_backward(
    params: Tensor, mean: Tensor, covariance: Tensor, grads: Tensor, eps: float
) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradients of parameters (11 branches C,), mean (C, 9) and covariance (C, 9, 9)."""
    from . import kernels

    channels, branches = len(mean), params.shape[1] // 11
    found = params.new_empty(params.numel()), torch.empty_like(mean), torch.empty_like(covariance)
    with torch.cuda.device_of(mean):
        kernels.fuse_backward[(-(-channels // CHANNELS),)](
            params, mean, covariance, grads, *found, channels, eps,
            BRANCHES=branches, BLOCK_C=CHANNELS, num_warps=WARPS,
        )  # fmt: skip
    return found


@fuse_backward.register_fake
def _(params: Tensor, mean: Tensor, covariance: Tensor, *_: Any) -> Tuple[Tensor, Tensor, Tensor]:
    return params.new_empty(params.numel()), torch.empty_like(mean), torch.empty_like(covariance)


@custom_op('mmlinglo::moments_backward', mutates_args=())
def moments_backward(mean: Tensor, grad_mean: Tensor, grad_covariance: Tensor, n: int) -> Tensor:
    """Coefficients (64, C) of :func:`input_gradient`, for moments over ``n`` patches."""
    from . import kernels

    channels = len(mean)
    out = mean.new_empty(64, channels)
    with torch.cuda.device_of(mean):
        kernels.moments_backward[(-(-channels // CHANNELS),)](
            mean, grad_mean.contiguous(), grad_covariance.contiguous(), _tables(mean.device)[0],
            out, float(n), channels, BLOCK_C=CHANNELS, num_warps=WARPS,
        )  # fmt: skip
    return out


@moments_backward.register_fake
def _(mean: Tensor, *_: Any) -> Tensor:
    return mean.new_empty(64, len(mean))


@custom_op('mmlinglo::input_gradient', mutates_args=())
def input_gradient(x: Tensor, coefficients: Tensor, grad: Sequence[Tensor]) -> Tensor:
    """Gradient of ``x`` through its moments.

    ``grad`` may have the gradient of a depth-wise convolution's output, and its kernel: what goes
    through the convolution is then added.
    """
    from . import kernels

    out, tile = torch.empty_like(x), _Tiling(x)
    outer, kernel = grad or (x, coefficients)
    with torch.cuda.device_of(x):
        kernels.input_gradient[tile.grid](
            x, coefficients, outer, kernel, out, *tile.sizes[1:],
            *_strides(x), *_strides(outer), *_strides(out), tile.rows, *tile.strips_and_chunks,
            CONVOLVE=bool(grad), BLOCK_W=tile.block_w, BLOCK_C=tile.block_c, num_warps=WARPS,
        )  # fmt: skip
    return out


@input_gradient.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def patch_moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """As :func:`.patch_moments.patch_moments`, without derivatives."""
    batch, _, height, width = x.shape
    partial_sums, centre = product_sums(x)
    return moments(partial_sums.sum(0), centre, batch, height, width)


def patch_moments_backward(
    x: Tensor, mean: Tensor, grad_mean: Tensor, grad_covariance: Tensor
) -> Tensor:
    """Gradient of maps from those of the mean (C, 9) and the covariance (C, 9, 9) of patches."""
    n = x.numel() // x.shape[1]
    return input_gradient(x, moments_backward(mean, grad_mean, grad_covariance, n), [])


def encode(
    x: Tensor, skip: bool, eps: float, parameters: Sequence[Tensor], group: Sequence[Group] = ()
) -> Tuple[Tensor, Tensor]:
    """All branches of an encoding, with the statistics of the batch.

    Args:
        x: Maps, (B, C, H, W).
        skip: Whether they are added.
        eps: Of all batch norms.
        parameters: float32; the kernels (C, 1, 3, 3) of the branches, then the weights (C,) of
            their norms, then the biases (C,).
        group: The processes of synchronized norms, None for all; empty if there are no others.

    Returns:
        Output (B, C, H, W), and (2, branches, C) without gradient: means and unbiased variances.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _Encode.apply(x, *parameters, skip, eps, group)


class _Encode(torch.autograd.Function):
    """Keeps ``x`` and what is as small as weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tuple[Tensor, Tensor]:
        *parameters, skip, eps, group = arguments
        channels = x.shape[1]
        n = x.numel() // channels
        with autocast_off(x):
            params = torch.cat([p.reshape(channels, -1) for p in parameters], dim=1)
            mean, covariance = own_mean, own_covariance = patch_moments(x)
            unbias, shared = 1.0, []
            if group:  # the number of all patches is on the GPU
                mean, covariance, total = gather_moments(own_mean, own_covariance, n, group[0])
                shared = [own_mean, n / total]
            else:
                unbias = n / (n - 1)
            kernel, bias, statistics = fuse(params, mean, covariance, eps, unbias, skip, x.dtype)
            if group:
                statistics[1] *= total / (total - 1)
            out = F.conv2d(x, kernel, bias, padding=1, groups=channels)
        ctx.save_for_backward(x, params, mean, covariance, kernel, *shared)
        ctx.eps, ctx.group = eps, group
        ctx.mark_non_differentiable(statistics)
        return out, statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Tuple[Any, ...]:
        x, params, mean, covariance, kernel, *shared = ctx.saved_tensors
        channels, branches = len(mean), params.shape[1] // 11
        with autocast_off(x):
            grads = weight_sums(grad, x).sum(0)
            found = fuse_backward(params, mean, covariance, grads, ctx.eps)
            grad_params, *grad_moments = found
            own_mean = mean
            if shared:
                own_mean, share = shared
                grad_moments = share_gradients(grad_moments, own_mean, mean, share, ctx.group[0])
            grad_x = None
            if ctx.needs_input_grad[0]:
                n = x.numel() // channels
                coefficients = moments_backward(own_mean, *grad_moments, n)
                grad_x = input_gradient(x, coefficients, [grad, kernel])
        sizes = [9 * channels] * branches + [channels] * 2 * branches
        parts = [part.view(channels, 1, 3, 3) if len(part) > channels else part for part in grad_params.split(sizes)]  # fmt: skip
        return (grad_x, *parts, None, None, None)

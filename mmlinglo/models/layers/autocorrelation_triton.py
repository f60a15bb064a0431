# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
# ruff: noqa: ANN001, ANN202, N803
import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # rows of a map that one program sums over
BLOCK_WIDTH = 32
BLOCK_CHANNELS = 32
NUM_LAGS = 13  # the others are their mirror images


@triton.jit
def _tile(x, row, columns, channels, centre, HEIGHT, WIDTH, CHANNELS):
    """x - centre at one row, (BLOCK_WIDTH, BLOCK_CHANNELS), and 0 outside the map."""
    inside = (row < HEIGHT) & (columns >= 0) & (columns < WIDTH)
    mask = inside[:, None] & (channels < CHANNELS)[None, :]
    offsets = (row * WIDTH + columns)[:, None] * CHANNELS + channels[None, :]
    values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, values - centre[None, :], 0.0)


@triton.jit
def _autocorrelation_kernel(
    x, centre, partial, HEIGHT, WIDTH, CHANNELS, CHUNKS,
    ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, NUM_LAGS: tl.constexpr,
):  # fmt: skip
    """partial[program, lag, channel]: sums over some rows of one image; one program per row block."""
    program = tl.program_id(0)
    image, first = program // CHUNKS, program % CHUNKS * ROWS
    channels = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    x += image.to(tl.int64) * HEIGHT * WIDTH * CHANNELS
    middle = tl.load(centre + channels, mask=channels < CHANNELS, other=0.0)
    for lag in tl.static_range(NUM_LAGS):
        # (0, 0) to (0, 2), then rows 1 and 2 with columns -2 to 2
        down = (lag + 2) // 5
        right = (lag + 2) % 5 - 2
        total = tl.zeros((BLOCK_CHANNELS,), tl.float32)
        for row in range(first, tl.minimum(first + ROWS, HEIGHT)):
            for start in range(0, WIDTH, BLOCK_WIDTH):
                columns = start + tl.arange(0, BLOCK_WIDTH)
                here = _tile(x, row, columns, channels, middle, HEIGHT, WIDTH, CHANNELS)
                there = _tile(
                    x, row + down, columns + right, channels, middle, HEIGHT, WIDTH, CHANNELS
                )
                total += tl.sum(here * there, axis=0)
        out = (program.to(tl.int64) * NUM_LAGS + lag) * CHANNELS + channels
        tl.store(partial + out, total, mask=channels < CHANNELS)


def autocorrelation_triton(x: Tensor, centre: Tensor) -> Tensor:
    """See :func:`mmlinglo.models.layers.autocorrelation.autocorrelation`."""
    batch_size, height, width, channels = x.shape
    chunks = triton.cdiv(height, ROWS)
    partial = centre.new_empty(batch_size * chunks, NUM_LAGS, channels)
    grid = (batch_size * chunks, triton.cdiv(channels, BLOCK_CHANNELS))
    _autocorrelation_kernel[grid](
        x, centre, partial, height, width, channels, chunks,
        ROWS, BLOCK_WIDTH, BLOCK_CHANNELS, NUM_LAGS,
    )  # fmt: skip
    half = partial.sum(0).t()
    return torch.cat([half[:, 1:].flip(1), half], dim=1).view(channels, 5, 5)

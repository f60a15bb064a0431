# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Triton kernels of :mod:`.gpu`. Maps are (B, C, H, W) with any strides; all sums are float32.

A program takes ``BLOCK_W`` columns of ``BLOCK_C`` channels down a strip of rows. What it needs of
the rows above stays in registers, so that the map is read from memory once. Sums over positions
are one partial sum a program, (programs, slots, C), without atomics: a run can be repeated bit by bit.
"""

# ruff: noqa: ANN001, ANN201, ANN202, N803  # Triton knows the types

import triton
import triton.language as tl


@triton.jit
def _offsets(column, channel, column_stride, channel_stride):
    """Of (BLOCK_W, BLOCK_C) in a row."""
    return column[:, None] * column_stride + channel[None, :] * channel_stride


@triton.jit
def _is_inside(column, channel, width, channels):
    """Which of (BLOCK_W, BLOCK_C) are in the map."""
    return ((column >= 0) & (column < width))[:, None] & (channel < channels)[None, :]


@triton.jit
def _load(row, offsets, inside):
    """(BLOCK_W, BLOCK_C) of a row, zero outside the map."""
    return tl.load(row + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_centred(row, offsets, inside, centre):
    return tl.where(inside, _load(row, offsets, inside) - centre[None, :], 0.0)


@triton.jit
def _store_sum(out, slot, values, channel, channels):
    """Sum of (BLOCK_W, BLOCK_C) over the columns, into a slot of (slots, C)."""
    tl.store(out + slot * channels + channel, tl.sum(values, 0), mask=channel < channels)


@triton.jit
def product_sums(
    x, centre_out, out, batch, height, width, channels,
    image_stride, channel_stride, row_stride, column_stride,
    images, rows, num_strips, num_chunks,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All sums of x - centre and of its products that moments of 3x3 patches are made of.

    The centre is the mean of 32 positions, the same ones in every program. The moments do not
    depend on it, but near the mean the sums do not cancel. Slots are those of :data:`.gpu.SLOTS`.
    """
    program = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    column = program % num_chunks * BLOCK_W + tl.arange(0, BLOCK_W)
    first_row = program // num_chunks % num_strips * rows
    last_row = tl.minimum(first_row + rows, height)
    first_image = program // (num_chunks * num_strips) * images
    last_image = tl.minimum(first_image + images, batch)

    # An odd step, so that the positions are in different columns.
    positions = tl.arange(0, 32) * (tl.maximum(batch * height * width // 32, 1) | 1)
    taken = positions < batch * height * width
    image, place = positions // (height * width), positions % (height * width)
    offsets = image.to(tl.int64) * image_stride
    offsets += place // width * row_stride + place % width * column_stride
    offsets = offsets[:, None] + channel[None, :] * channel_stride
    mask = taken[:, None] & (channel < channels)[None, :]
    sample = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    centre = tl.sum(sample, 0) / tl.sum(taken.to(tl.float32), 0)
    if program == 0:
        tl.store(centre_out + channel, centre, mask=channel < channels)

    at = _offsets(column, channel, column_stride, channel_stride)
    in0 = _is_inside(column, channel, width, channels)
    in1 = _is_inside(column + 1, channel, width, channels)
    in2 = _is_inside(column + 2, channel, width, channels)
    zeros = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    total = zeros
    r00, r01, r02 = zeros, zeros, zeros
    r1m2, r1m1, r10, r11, r12 = zeros, zeros, zeros, zeros, zeros
    r2m2, r2m1, r20, r21, r22 = zeros, zeros, zeros, zeros, zeros
    base = x + first_image.to(tl.int64) * image_stride
    for _image in range(first_image, last_image):
        # Rows above, one (p) and two (q), at columns +0, +1 and +2.
        row_q, row_p = base + (first_row - 2) * row_stride, base + (first_row - 1) * row_stride
        q0 = _load_centred(row_q, at, in0 & (first_row >= 2), centre)
        q1 = _load_centred(row_q + column_stride, at, in1 & (first_row >= 2), centre)
        q2 = _load_centred(row_q + 2 * column_stride, at, in2 & (first_row >= 2), centre)
        p0 = _load_centred(row_p, at, in0 & (first_row >= 1), centre)
        p1 = _load_centred(row_p + column_stride, at, in1 & (first_row >= 1), centre)
        p2 = _load_centred(row_p + 2 * column_stride, at, in2 & (first_row >= 1), centre)
        for row in range(first_row, last_row):
            x0 = _load_centred(base + row * row_stride, at, in0, centre)
            x1 = _load_centred(base + row * row_stride + column_stride, at, in1, centre)
            x2 = _load_centred(base + row * row_stride + 2 * column_stride, at, in2, centre)
            total += x0
            r00, r01, r02 = r00 + x0 * x0, r01 + x0 * x1, r02 + x0 * x2
            r1m2, r1m1, r10 = r1m2 + p2 * x0, r1m1 + p1 * x0, r10 + p0 * x0
            r11, r12 = r11 + p0 * x1, r12 + p0 * x2
            r2m2, r2m1, r20 = r2m2 + q2 * x0, r2m1 + q1 * x0, r20 + q0 * x0
            r21, r22 = r21 + q0 * x1, r22 + q0 * x2
            q0, q1, q2, p0, p1, p2 = p0, p1, p2, x0, x1, x2
        base += image_stride

    out += program.to(tl.int64) * 54 * channels
    _store_sum(out, 0, r00, channel, channels)
    _store_sum(out, 1, r01, channel, channels)
    _store_sum(out, 2, r02, channel, channels)
    _store_sum(out, 3, r1m2, channel, channels)
    _store_sum(out, 4, r1m1, channel, channels)
    _store_sum(out, 5, r10, channel, channels)
    _store_sum(out, 6, r11, channel, channels)
    _store_sum(out, 7, r12, channel, channels)
    _store_sum(out, 8, r2m2, channel, channels)
    _store_sum(out, 9, r2m1, channel, channels)
    _store_sum(out, 10, r20, channel, channels)
    _store_sum(out, 11, r21, channel, channels)
    _store_sum(out, 12, r22, channel, channels)
    for side in tl.static_range(2):  # the products down the first and the last column
        on_side = (column == side * (width - 1))[:, None]
        _store_sum(out, 13 + 3 * side, tl.where(on_side, r00, 0.0), channel, channels)
        _store_sum(out, 14 + 3 * side, tl.where(on_side, r10, 0.0), channel, channels)
        _store_sum(out, 15 + 3 * side, tl.where(on_side, r20, 0.0), channel, channels)
    _store_sum(out, 19, total, channel, channels)
    for line in tl.static_range(4):  # the first, second, last but one and last column
        chosen = line if line < 2 else width - 4 + line
        _store_sum(
            out, 20 + line, tl.where((column == chosen)[:, None], total, 0.0), channel, channels
        )
    for line in tl.static_range(4):  # such rows, and their crossings with such columns
        row = line if line < 2 else height - 4 + line
        is_here = (row >= first_row) & (row < last_row)
        total, r00, r01, r02 = zeros, zeros, zeros, zeros
        base = x + first_image.to(tl.int64) * image_stride
        for _image in range(first_image, last_image):
            x0 = _load_centred(base + row * row_stride, at, in0 & is_here, centre)
            total += x0
            if line % 3 == 0:
                x1 = _load_centred(
                    base + row * row_stride + column_stride, at, in1 & is_here, centre
                )
                x2 = _load_centred(
                    base + row * row_stride + 2 * column_stride, at, in2 & is_here, centre
                )
                r00, r01, r02 = r00 + x0 * x0, r01 + x0 * x1, r02 + x0 * x2
            base += image_stride
        _store_sum(out, 24 + 5 * line, total, channel, channels)
        for other in tl.static_range(4):
            chosen = other if other < 2 else width - 4 + other
            crossing = tl.where((column == chosen)[:, None], total, 0.0)
            _store_sum(out, 25 + 5 * line + other, crossing, channel, channels)
        if line % 3 == 0:
            slot = 44 + 5 * (line // 3)
            _store_sum(out, slot, r00, channel, channels)
            _store_sum(out, slot + 1, r01, channel, channels)
            _store_sum(out, slot + 2, r02, channel, channels)
            for side in tl.static_range(2):
                on_side = (column == side * (width - 1))[:, None]
                _store_sum(out, slot + 3 + side, tl.where(on_side, r00, 0.0), channel, channels)


@triton.jit
def moments(
    sums, centre, tables, left_out, mean_out, covariance_out,
    n, height, width, channels, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean (C, 9) and covariance (C, 9, 9) of the patches from the sums (54, C).

    The columns of a tile are the pairs of entries of a patch, 9 k + j, up to 81 of 128.
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    pair = tl.arange(0, 128)
    inside = (channel < channels)[:, None]
    c = tl.load(centre + channel, mask=channel < channels, other=0.0)[:, None]
    second = tl.zeros((BLOCK_C, 128), tl.float32)
    cross, mean_k, mean_j = second, second, second
    for first_slot in tl.range(0, 64, 16, num_stages=1):  # less shared memory
        slot = first_slot + tl.arange(0, 16)
        place = sums + slot[None, :] * channels + channel[:, None]
        found = tl.load(place, mask=inside & (slot < 54)[None, :], other=0.0) / n
        table = tables + slot[:, None] * 128 + pair[None, :]
        second += tl.dot(found, tl.load(table), input_precision='ieee')
        cross += tl.dot(found, tl.load(table + 64 * 128), input_precision='ieee')
        mean_k += tl.dot(found, tl.load(table + 2 * 64 * 128), input_precision='ieee')
        mean_j += tl.dot(found, tl.load(table + 3 * 64 * 128), input_precision='ieee')
    # The patches of a map of ones: in whole numbers, since their covariance is a small difference.
    area = tl.zeros((), tl.int64) + height
    area *= width
    inside_k = tl.maximum(height - tl.load(left_out + pair), 0).to(tl.int64)
    inside_k *= tl.maximum(width - tl.load(left_out + 128 + pair), 0)
    inside_j = tl.maximum(height - tl.load(left_out + 256 + pair), 0).to(tl.int64)
    inside_j *= tl.maximum(width - tl.load(left_out + 384 + pair), 0)
    inside_both = tl.maximum(height - tl.load(left_out + 512 + pair), 0).to(tl.int64)
    inside_both *= tl.maximum(width - tl.load(left_out + 640 + pair), 0)
    ones = (inside_both * area - inside_k * inside_j).to(tl.float32) / area.to(tl.float32)
    ones = (ones / area.to(tl.float32))[None, :]
    ones_k = (inside_k.to(tl.float32) / area.to(tl.float32))[None, :]
    ones_j = (inside_j.to(tl.float32) / area.to(tl.float32))[None, :]
    covariance = second - mean_k * mean_j + c * (cross - mean_k * ones_j - mean_j * ones_k)
    covariance += c * c * ones
    mask = inside & (pair < 81)[None, :]
    tl.store(covariance_out + channel[:, None] * 81 + pair[None, :], covariance, mask=mask)
    mask = mask & (pair % 9 == 0)[None, :]
    tl.store(mean_out + channel[:, None] * 9 + pair[None, :] // 9, mean_k + c * ones_k, mask=mask)


@triton.jit
def _branch(
    params, mean, covariance, number, channel, channels, BRANCHES: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """A branch's kernel (BLOCK_C, 16), the covariance of the patches times it, its norm's weight,
    and the mean and the variance of its output.
    """
    entry = tl.arange(0, 16)
    inside = channel < channels
    mask = inside[:, None] & (entry < 9)[None, :]
    own = params + channel * (11 * BRANCHES)
    w = tl.load(own[:, None] + 9 * number + entry[None, :], mask=mask, other=0.0)
    gamma = tl.load(own + 9 * BRANCHES + number, mask=inside, other=0.0)
    m = tl.load(mean + channel[:, None] * 9 + entry[None, :], mask=mask, other=0.0)
    product = tl.zeros((BLOCK_C, 16), tl.float32)
    for j in range(9):
        column = covariance + channel[:, None] * 81 + entry[None, :] * 9 + j
        w_j = tl.load(own + 9 * number + j, mask=inside, other=0.0)
        product += tl.load(column, mask=mask, other=0.0) * w_j[:, None]
    return w, product, gamma, tl.sum(w * m, 1), tl.sum(w * product, 1)


@triton.jit
def fuse(
    params, mean, covariance, kernel_out, bias_out, statistics_out,
    channels, eps, unbias, BRANCHES: tl.constexpr, SKIP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Kernel (C, 9) and bias (C,) of all branches, and their statistics (2, branches, C).

    ``params`` (C, 11 branches) has the kernels, then the weights and the biases of the norms.
    The statistics are means and variances, these times ``unbias`` as running variances want them.
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    entry = tl.arange(0, 16)
    inside = channel < channels
    kernel = tl.zeros((BLOCK_C, 16), tl.float32)
    if SKIP:
        kernel += (entry == 4).to(tl.float32)[None, :]
    bias = tl.zeros((BLOCK_C,), tl.float32)
    for i in tl.static_range(BRANCHES):
        w, _product, gamma, batch_mean, batch_var = _branch(
            params, mean, covariance, i, channel, channels, BRANCHES, BLOCK_C
        )
        batch_var = tl.maximum(batch_var, 0.0)
        beta = params + channel * (11 * BRANCHES) + 10 * BRANCHES + i
        scale = gamma / tl.sqrt(batch_var + eps)
        kernel += scale[:, None] * w
        bias += tl.load(beta, mask=inside, other=0.0) - scale * batch_mean
        tl.store(statistics_out + i * channels + channel, batch_mean, mask=inside)
        place = statistics_out + (BRANCHES + i) * channels + channel
        tl.store(place, batch_var * unbias, mask=inside)
    entries = inside[:, None] & (entry < 9)[None, :]
    tl.store(kernel_out + channel[:, None] * 9 + entry[None, :], kernel, mask=entries)
    tl.store(bias_out + channel, bias, mask=inside)


@triton.jit
def weight_sums(
    grad, x, out, batch, height, width, channels,
    grad_image_stride, grad_channel_stride, grad_row_stride, grad_column_stride,
    image_stride, channel_stride, row_stride, column_stride,
    images, rows, num_strips, num_chunks,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of the kernel, slots 0 to 8, and of the bias of a depth-wise 3x3 convolution."""
    program = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    column = program % num_chunks * BLOCK_W + tl.arange(0, BLOCK_W)
    first_row = program // num_chunks % num_strips * rows
    last_row = tl.minimum(first_row + rows, height)
    first_image = program // (num_chunks * num_strips) * images
    last_image = tl.minimum(first_image + images, batch)
    to = _offsets(column, channel, grad_column_stride, grad_channel_stride)
    inm1 = _is_inside(column - 1, channel, width, channels)
    at = _offsets(column, channel, column_stride, channel_stride)
    in0 = _is_inside(column, channel, width, channels)
    in1 = _is_inside(column + 1, channel, width, channels)
    zeros = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    s0, s1, s2, s3, s4, s5, s6, s7, s8 = zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros  # fmt: skip
    total = zeros
    base = x + first_image.to(tl.int64) * image_stride
    grad_base = grad + first_image.to(tl.int64) * grad_image_stride
    for _image in range(first_image, last_image):
        above, here = zeros, zeros
        # The strip is one of rows of the gradient; each row of x meets three of them.
        for row in range(first_row - 1, last_row + 1):
            below = _load(grad_base + (row + 1) * grad_row_stride, to, in0 & (row + 1 < last_row))
            total += below
            is_in_map = (row >= 0) & (row < height)
            left = _load(base + row * row_stride - column_stride, at, inm1 & is_in_map)
            middle = _load(base + row * row_stride, at, in0 & is_in_map)
            right = _load(base + row * row_stride + column_stride, at, in1 & is_in_map)
            s0, s1, s2 = s0 + below * left, s1 + below * middle, s2 + below * right
            s3, s4, s5 = s3 + here * left, s4 + here * middle, s5 + here * right
            s6, s7, s8 = s6 + above * left, s7 + above * middle, s8 + above * right
            above, here = here, below
        base += image_stride
        grad_base += grad_image_stride
    out += program.to(tl.int64) * 10 * channels
    _store_sum(out, 0, s0, channel, channels)
    _store_sum(out, 1, s1, channel, channels)
    _store_sum(out, 2, s2, channel, channels)
    _store_sum(out, 3, s3, channel, channels)
    _store_sum(out, 4, s4, channel, channels)
    _store_sum(out, 5, s5, channel, channels)
    _store_sum(out, 6, s6, channel, channels)
    _store_sum(out, 7, s7, channel, channels)
    _store_sum(out, 8, s8, channel, channels)
    _store_sum(out, 9, total, channel, channels)


@triton.jit
def fuse_backward(
    params, mean, covariance, grads, grad_params, grad_mean, grad_covariance,
    channels, eps, BRANCHES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of what :func:`fuse` reads, from those of kernel and bias, ``grads`` (10, C).

    ``grad_params`` is (11 branches C): kernels (branches, C, 9), weights and biases (branches, C).
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    entry, pair = tl.arange(0, 16), tl.arange(0, 128)
    inside = channel < channels
    entries, pairs = inside[:, None] & (entry < 9)[None, :], inside[:, None] & (pair < 81)[None, :]
    m = tl.load(mean + channel[:, None] * 9 + entry[None, :], mask=entries, other=0.0)
    grad_kernel = tl.load(
        grads + entry[None, :] * channels + channel[:, None], mask=entries, other=0.0
    )
    grad_bias = tl.load(grads + 9 * channels + channel, mask=inside, other=0.0)
    to_mean = tl.zeros((BLOCK_C, 16), tl.float32)
    to_covariance = tl.zeros((BLOCK_C, 128), tl.float32)
    for i in tl.static_range(BRANCHES):
        w, product, gamma, batch_mean, var = _branch(
            params, mean, covariance, i, channel, channels, BRANCHES, BLOCK_C
        )
        kernels = (params + channel * (11 * BRANCHES) + 9 * i)[:, None]
        w_k = tl.load(kernels + pair[None, :] // 9, mask=pairs, other=0.0)
        w_j = tl.load(kernels + pair[None, :] % 9, mask=pairs, other=0.0)
        inverse = 1 / tl.sqrt(tl.maximum(var, 0.0) + eps)
        to_scale = tl.sum(w * grad_kernel, 1) - batch_mean * grad_bias
        to_var = tl.where(var >= 0, -0.5 * to_scale * gamma * inverse * inverse * inverse, 0.0)
        to_batch_mean = -gamma * inverse * grad_bias
        to_w = (gamma * inverse)[:, None] * grad_kernel + to_batch_mean[:, None] * m
        to_w += 2 * to_var[:, None] * product
        to_mean += to_batch_mean[:, None] * w
        to_covariance += to_var[:, None] * w_k * w_j
        place = grad_params + (i * channels + channel[:, None]) * 9 + entry[None, :]
        tl.store(place, to_w, mask=entries)
        norms = grad_params + 9 * BRANCHES * channels + i * channels + channel
        tl.store(norms, to_scale * inverse, mask=inside)
        tl.store(norms + BRANCHES * channels, grad_bias, mask=inside)
    tl.store(grad_mean + channel[:, None] * 9 + entry[None, :], to_mean, mask=entries)
    place = grad_covariance + channel[:, None] * 81 + pair[None, :]
    tl.store(place, to_covariance, mask=pairs)


@triton.jit
def moments_backward(
    mean, grad_mean, grad_covariance, tables, out, n, channels, BLOCK_C: tl.constexpr
):
    """Coefficients (64, C) with which :func:`input_gradient` reads x.

    In the slots of the products, they are the gradients of the products; slots 19 to 27 have what
    is added whatever x is: everywhere, and what of it is wrong in border lines and corners.
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    pair, slot = tl.arange(0, 128), tl.arange(0, 64)
    inside = (channel < channels)[:, None]
    k, j = pair[None, :] // 9, pair[None, :] % 9
    mask = inside & (pair < 81)[None, :]
    grad = tl.load(grad_covariance + channel[:, None] * 81 + 9 * k + j, mask=mask, other=0.0)
    transposed = tl.load(grad_covariance + channel[:, None] * 81 + 9 * j + k, mask=mask, other=0.0)
    m = tl.load(mean + channel[:, None] * 9 + j, mask=mask, other=0.0)
    to_mean = tl.load(grad_mean + channel[:, None] * 9 + k, mask=mask & (j == 0), other=0.0)
    from_pairs = tables + slot[None, :] * 128 + pair[:, None]
    result = tl.dot(grad, tl.load(from_pairs), input_precision='ieee')
    shifts = tl.load(from_pairs + 4 * 64 * 128)
    result += tl.dot(to_mean - (grad + transposed) * m, shifts, input_precision='ieee')
    tl.store(out + slot[None, :] * channels + channel[:, None], result / n, mask=inside)


@triton.jit
def _load_slot(coefficients, slot, channel, channels):
    values = tl.load(coefficients + slot * channels + channel, mask=channel < channels, other=0.0)
    return values[None, :]


@triton.jit
def input_gradient(
    x, coefficients, grad, kernel, out, height, width, channels,
    image_stride, channel_stride, row_stride, column_stride,
    grad_image_stride, grad_channel_stride, grad_row_stride, grad_column_stride,
    out_image_stride, out_channel_stride, out_row_stride, out_column_stride,
    rows, num_strips, num_chunks,
    CONVOLVE: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of x through the moments of its patches and, if CONVOLVE, through the convolution.

    Each row of x and of the output's gradient is added to the five rows of the result that it
    reaches, which wait in registers.
    """
    program = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    column = program % num_chunks * BLOCK_W + tl.arange(0, BLOCK_W)
    first_row = program // num_chunks % num_strips * rows
    last_row = tl.minimum(first_row + rows, height)
    image = (program // (num_chunks * num_strips)).to(tl.int64)
    x += image * image_stride
    grad += image * grad_image_stride
    out += image * out_image_stride

    r00 = 2 * _load_slot(coefficients, 0, channel, channels)
    r01 = _load_slot(coefficients, 1, channel, channels)
    r02 = _load_slot(coefficients, 2, channel, channels)
    r1m2 = _load_slot(coefficients, 3, channel, channels)
    r1m1 = _load_slot(coefficients, 4, channel, channels)
    r10 = _load_slot(coefficients, 5, channel, channels)
    r11 = _load_slot(coefficients, 6, channel, channels)
    r12 = _load_slot(coefficients, 7, channel, channels)
    r2m2 = _load_slot(coefficients, 8, channel, channels)
    r2m1 = _load_slot(coefficients, 9, channel, channels)
    r20 = _load_slot(coefficients, 10, channel, channels)
    r21 = _load_slot(coefficients, 11, channel, channels)
    r22 = _load_slot(coefficients, 12, channel, channels)
    # The lags down a column, with those of the first and the last column, and what is added.
    first = (column == 0).to(tl.float32)[:, None]
    last = (column == width - 1).to(tl.float32)[:, None]
    down0 = r00 + 2 * first * _load_slot(coefficients, 13, channel, channels)
    down0 += 2 * last * _load_slot(coefficients, 16, channel, channels)
    down1 = r10 + first * _load_slot(coefficients, 14, channel, channels)
    down1 += last * _load_slot(coefficients, 17, channel, channels)
    down2 = r20 + first * _load_slot(coefficients, 15, channel, channels)
    down2 += last * _load_slot(coefficients, 18, channel, channels)
    shift = _load_slot(coefficients, 19, channel, channels)
    shift += first * _load_slot(coefficients, 22, channel, channels)
    shift += last * _load_slot(coefficients, 23, channel, channels)

    inm2 = _is_inside(column - 2, channel, width, channels)
    inm1 = _is_inside(column - 1, channel, width, channels)
    at = _offsets(column, channel, column_stride, channel_stride)
    in0 = _is_inside(column, channel, width, channels)
    in1 = _is_inside(column + 1, channel, width, channels)
    in2 = _is_inside(column + 2, channel, width, channels)
    to = _offsets(column, channel, grad_column_stride, grad_channel_stride)
    zeros = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    above2, above1, here, below1, below2 = zeros, zeros, zeros, zeros, zeros
    for row in range(first_row - 2, last_row + 2):
        is_in_map = (row >= 0) & (row < height)
        xm2 = _load(x + row * row_stride - 2 * column_stride, at, inm2 & is_in_map)
        xm1 = _load(x + row * row_stride - column_stride, at, inm1 & is_in_map)
        x0 = _load(x + row * row_stride, at, in0 & is_in_map)
        x1 = _load(x + row * row_stride + column_stride, at, in1 & is_in_map)
        x2 = _load(x + row * row_stride + 2 * column_stride, at, in2 & is_in_map)
        above2 += r2m2 * xm2 + r2m1 * xm1 + down2 * x0 + r21 * x1 + r22 * x2
        above1 += r1m2 * xm2 + r1m1 * xm1 + down1 * x0 + r11 * x1 + r12 * x2
        here += r02 * (xm2 + x2) + r01 * (xm1 + x1) + down0 * x0 + shift
        below1 += r12 * xm2 + r11 * xm1 + down1 * x0 + r1m1 * x1 + r1m2 * x2
        below2 += r22 * xm2 + r21 * xm1 + down2 * x0 + r2m1 * x1 + r2m2 * x2
        for side in tl.static_range(2):
            if row == side * (height - 1):
                lags = coefficients + (44 + 5 * side) * channels
                here += 2 * _load_slot(lags, 0, channel, channels) * x0
                here += _load_slot(lags, 1, channel, channels) * (xm1 + x1)
                here += _load_slot(lags, 2, channel, channels) * (xm2 + x2)
                here += 2 * first * _load_slot(lags, 3, channel, channels) * x0
                here += 2 * last * _load_slot(lags, 4, channel, channels) * x0
                here += _load_slot(coefficients, 20 + side, channel, channels)
                here += first * _load_slot(coefficients, 24 + 2 * side, channel, channels)
                here += last * _load_slot(coefficients, 25 + 2 * side, channel, channels)
        if CONVOLVE:
            left = _load(grad + row * grad_row_stride - grad_column_stride, to, inm1 & is_in_map)
            middle = _load(grad + row * grad_row_stride, to, in0 & is_in_map)
            right = _load(grad + row * grad_row_stride + grad_column_stride, to, in1 & is_in_map)
            for i in tl.static_range(3):
                place = kernel + channel * 9 + 3 * i
                k0 = tl.load(place, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
                k1 = tl.load(place + 1, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
                k2 = tl.load(place + 2, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
                reached = k0 * right + k1 * middle + k2 * left
                if i == 0:
                    above1 += reached
                elif i == 1:
                    here += reached
                else:
                    below1 += reached
        target = row - 2
        mask = in0 & (target >= first_row) & (target < last_row)
        offsets = column[:, None] * out_column_stride + channel[None, :] * out_channel_stride
        tl.store(out + target * out_row_stride + offsets, above2, mask=mask)
        above2, above1, here, below1, below2 = above1, here, below1, below2, zeros

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The stand-in for mmcv's compiled operators, called as detectors call it: through mmcv.ops.

Where compiled operators are installed, both are compared. Everywhere, the stand-in is compared with what the
operators are defined as.
"""

import importlib

import mmcv.ops
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mmlinglo import mmcv_ops

COMPILED = mmcv_ops.is_compiled(mmcv_ops.find_ext())
needs_compiled = pytest.mark.skipif(not COMPILED, reason='mmcv has no compiled operators here')
MODULES = (
    'nms',
    'roi_align',
    'roi_pool',
    'focal_loss',
    'deform_conv',
    'modulated_deform_conv',
    'carafe',
)


@pytest.fixture
def stand_in(monkeypatch):
    for name in MODULES:
        monkeypatch.setattr(importlib.import_module(f'mmcv.ops.{name}'), 'ext_module', mmcv_ops)


def with_stand_in(function, *args, **kwargs):
    with pytest.MonkeyPatch.context() as patch:
        for name in MODULES:
            patch.setattr(importlib.import_module(f'mmcv.ops.{name}'), 'ext_module', mmcv_ops)
        return function(*args, **kwargs)


def make_boxes(number, seed=0, whole=False):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(number, 2, generator=generator) * 90
    boxes = torch.cat([corners, corners + 2 + torch.rand(number, 2, generator=generator) * 40], 1)
    scores = torch.rand(number, generator=generator)
    return (boxes.round(), (scores * 20).round() / 20) if whole else (boxes, scores)


def make_rois(number=12, images=2):
    boxes, _ = make_boxes(number)
    return torch.cat([torch.arange(number)[:, None] % images, boxes], 1).float()


# Against the compiled operators


@needs_compiled
@pytest.mark.parametrize(
    'whole', [False, True]
)  # whole numbers: equal scores, IoUs equal to the threshold
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [0.3, 0.5, 0.6, 0.7])
def test_nms_is_that_of_mmcv(threshold, offset, whole):
    for seed in range(5):
        boxes, scores = make_boxes(300, seed, whole)
        expected = mmcv.ops.nms(boxes, scores, threshold, offset)
        found = with_stand_in(mmcv.ops.nms, boxes, scores, threshold, offset)
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[0], expected[0])


@needs_compiled
@pytest.mark.parametrize('whole', [False, True])
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
@pytest.mark.parametrize('min_score', [1e-3, 0.3])
def test_soft_nms_is_that_of_mmcv(min_score, method, offset, whole):
    for seed in range(3):
        boxes, scores = make_boxes(200, seed, whole)
        args = (boxes, scores, 0.4, 0.5, min_score, method, offset)
        expected = mmcv.ops.soft_nms(*args)
        found = with_stand_in(mmcv.ops.soft_nms, *args)
        assert torch.equal(found[1], expected[1])
        torch.testing.assert_close(found[0], expected[0])


def output_and_gradients(function, *tensors):
    tensors = [tensor.clone().requires_grad_(tensor.is_floating_point()) for tensor in tensors]
    output = function(*tensors)
    output.backward(torch.linspace(-1, 1, output.numel()).reshape(output.shape).to(output))
    return [output.detach(), *(tensor.grad for tensor in tensors)]


@needs_compiled
@pytest.mark.parametrize('aligned', [False, True])
@pytest.mark.parametrize('sampling_ratio', [0, 2])
def test_roi_align_is_that_of_mmcv(sampling_ratio, aligned):
    maps, rois = torch.randn(2, 5, 30, 40), make_rois()

    def pool(maps):
        return mmcv.ops.roi_align(maps, rois, (7, 5), 0.25, sampling_ratio, 'avg', aligned)

    expected = output_and_gradients(pool, maps)
    found = with_stand_in(output_and_gradients, pool, maps)
    torch.testing.assert_close(found, expected)


DEFORMED = [  # stride, padding, dilation, groups, groups of offsets
    (1, 1, 1, 1, 1),
    ((2, 1), (0, 2), (1, 2), 1, 2),
    (1, (1, 0), 1, 2, 1),
]


def make_deformed(geometry):
    (sy, sx), (py, px), (dy, dx) = (
        value if isinstance(value, tuple) else (value, value) for value in geometry[:3]
    )
    height, width = (11 + 2 * py - 2 * dy - 1) // sy + 1, (13 + 2 * px - 2 * dx - 1) // sx + 1
    maps, weight = torch.randn(2, 4, 11, 13), torch.randn(6, 4 // geometry[3], 3, 3)
    offset = 2 * torch.randn(2, 18 * geometry[4], height, width)
    mask = torch.rand(2, 9 * geometry[4], height, width)
    return maps, offset, mask, weight, torch.randn(6)


@needs_compiled
@pytest.mark.parametrize('geometry', DEFORMED)
def test_deform_conv_is_that_of_mmcv(geometry):
    maps, offset, _, weight, _ = make_deformed(geometry)

    def convolve(maps, offset, weight):
        return mmcv.ops.deform_conv2d(maps, offset, weight, *geometry)

    expected = output_and_gradients(convolve, maps, offset, weight)
    found = with_stand_in(output_and_gradients, convolve, maps, offset, weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@needs_compiled
@pytest.mark.parametrize('with_bias', [False, True])
@pytest.mark.parametrize('geometry', DEFORMED)
def test_modulated_deform_conv_is_that_of_mmcv(geometry, with_bias):
    maps, offset, mask, weight, bias = make_deformed(geometry)
    tensors = (maps, offset, mask, weight, *([bias] if with_bias else []))

    def convolve(maps, offset, mask, weight, bias=None):
        return mmcv.ops.modulated_deform_conv2d(maps, offset, mask, weight, bias, *geometry)

    expected = output_and_gradients(convolve, *tensors)
    found = with_stand_in(output_and_gradients, convolve, *tensors)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@needs_compiled
def test_compiled_operators_are_left_alone():
    assert mmcv_ops.is_compiled(importlib.import_module('mmcv._ext').__spec__)
    assert not mmcv_ops.link()


# Against definitions


def intersection_over_union(a, b, offset):
    width, height = (max(0, min(a[2 + i], b[2 + i]) - max(a[i], b[i]) + offset) for i in range(2))
    area, other = ((c[2] - c[0] + offset) * (c[3] - c[1] + offset) for c in (a, b))
    return width * height / (area + other - width * height)


@pytest.mark.usefixtures('stand_in')
@pytest.mark.parametrize('offset', [0, 1])
def test_nms_drops_what_overlaps_a_better_box(offset):
    boxes, scores = make_boxes(80)
    kept = []
    for i in scores.argsort(descending=True).tolist():
        a = boxes[i].tolist()
        if all(intersection_over_union(a, boxes[j].tolist(), offset) <= 0.4 for j in kept):
            kept.append(i)
    assert mmcv.ops.nms(boxes, scores, 0.4, offset)[1].tolist() == kept


@pytest.mark.usefixtures('stand_in')
def test_nms_keeps_a_box_whose_overlap_equals_the_threshold():
    boxes = torch.tensor([[0.0, 0, 8, 10], [2, 0, 10, 10]])  # IoU 60 / 100
    assert len(mmcv.ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.6)[1]) == 2
    assert len(mmcv.ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.59)[1]) == 1


@pytest.mark.usefixtures('stand_in')
def test_soft_nms_lowers_scores():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [50, 50, 60, 60]])  # IoU 0.5
    dets, order = mmcv.ops.soft_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.3, method='linear')
    assert order.tolist() == [0, 2, 1]
    torch.testing.assert_close(dets[:, 4], torch.tensor([0.9, 0.7, 0.4]))
    dets, _ = mmcv.ops.soft_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), sigma=0.5, method='gaussian')
    torch.testing.assert_close(dets[2, 4], torch.tensor(0.8 * np.exp(-0.5), dtype=torch.float32))
    assert mmcv.ops.soft_nms(boxes[:0], torch.zeros(0))[0].shape == (0, 5)


@pytest.mark.usefixtures('stand_in')
def test_roi_align_of_a_plane_is_its_height_at_the_centres():
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(24.0), indexing='ij')
    maps = torch.stack([x + 3 * y, 2 * x - y])[None]
    pooled = mmcv.ops.roi_align(maps, torch.tensor([[0.0, 8, 4, 40, 28]]), (3, 4), 0.5, 2)
    cx = (4 + torch.arange(4) * 4 + 2 - 0.5)[None]
    cy = (2 + torch.arange(3) * 4 + 2 - 0.5)[:, None]
    torch.testing.assert_close(pooled[0], torch.stack([cx + 3 * cy, 2 * cx - cy]))


def pool_by_hand(maps, rois, size, scale):
    """Maxima as mmcv's CUDA kernel takes them; it has no such operator for the CPU."""
    height, width = size
    pooled = maps.new_zeros(len(rois), maps.size(1), height, width)
    for r, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = x1 * scale, y1 * scale, (x2 + 1) * scale, (y2 + 1) * scale
        for i in range(height):
            for j in range(width):
                top = int(np.floor(y1 + i * (y2 - y1) / height))
                bottom = int(np.ceil(y1 + (i + 1) * (y2 - y1) / height))
                left = int(np.floor(x1 + j * (x2 - x1) / width))
                right = int(np.ceil(x1 + (j + 1) * (x2 - x1) / width))
                part = maps[int(image), :, max(top, 0) : bottom, max(left, 0) : right]
                if part.numel() and x2 > x1 and y2 > y1 and bottom > 0 and right > 0:
                    pooled[r, :, i, j] = part.amax((1, 2))
    return pooled


@pytest.mark.usefixtures('stand_in')
def test_roi_pool_takes_the_maxima_of_the_parts():
    rois = make_rois()
    rois[1, 1:] += torch.tensor([80, 60, 80, 60])  # beyond the right and lower edge
    rois[2, 1:] -= torch.tensor([99, 99, 99, 99])  # before the left and upper edge
    rois[3, 3] = rois[3, 1] - 3  # no region
    maps = torch.randn(2, 5, 30, 40, dtype=torch.float64)

    def pool(maps):
        return mmcv.ops.roi_pool(maps, rois.double(), (3, 4), 0.25)

    found, gradient = output_and_gradients(pool, maps)
    expected, expected_gradient = output_and_gradients(
        lambda maps: pool_by_hand(maps, rois, (3, 4), 0.25), maps
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.usefixtures('stand_in')
@pytest.mark.parametrize('modulated', [False, True])
def test_deform_conv_without_offsets_is_a_convolution(modulated):
    maps, offset, mask, weight, bias = make_deformed(DEFORMED[0])
    expected = F.conv2d(maps, weight, bias if modulated else None, padding=1)
    if modulated:
        found = mmcv.ops.modulated_deform_conv2d(
            maps, 0 * offset, torch.ones_like(mask), weight, bias, 1, 1
        )
    else:
        found = mmcv.ops.deform_conv2d(maps, 0 * offset, weight, 1, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures('stand_in')
@pytest.mark.parametrize('weighted', [False, True])
def test_sigmoid_focal_loss(weighted):
    """mmcv's operator needs a GPU; its formula and the derivative are written out here."""
    logits, target = (
        3 * torch.randn(9, 4, dtype=torch.float64),
        torch.randint(5, (9,)),
    )  # class 4: background
    weight = logits.new_tensor([0.5, 1.0, 2.0, 3.0]) if weighted else None

    def focal_loss(logits):
        return mmcv.ops.sigmoid_focal_loss(logits, target, 2.0, 0.3, weight, 'none')

    def expected_loss(logits):
        positive, p = F.one_hot(target, 5)[:, :4], logits.sigmoid()
        loss = (
            -0.3 * positive * (1 - p) ** 2 * p.log() - 0.7 * (1 - positive) * p**2 * (1 - p).log()
        )
        return (
            loss
            if weight is None
            else loss * torch.cat([weight, weight.new_ones(1)])[target][:, None]
        )

    found = output_and_gradients(focal_loss, logits)
    torch.testing.assert_close(found, output_and_gradients(expected_loss, logits))


DIFFERENTIABLE = {
    'roi_align': lambda maps: mmcv.ops.roi_align(maps, make_rois().double(), 3, 0.1, 2),
    'roi_pool': lambda maps: mmcv.ops.roi_pool(maps, make_rois().double(), 2, 0.1),
    'focal_loss': lambda maps: mmcv.ops.sigmoid_focal_loss(
        maps.flatten(1).T, torch.arange(maps[0].numel()) % 3
    ),
}


@pytest.mark.usefixtures('stand_in')
@pytest.mark.parametrize('name', DIFFERENTIABLE)
def test_gradients(name):
    maps = torch.randn(2, 2, 8, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(DIFFERENTIABLE[name], maps)


@pytest.mark.usefixtures('stand_in')
@pytest.mark.parametrize('geometry', DEFORMED)
def test_gradients_of_deform_conv(geometry):
    tensors = [t.double().requires_grad_() for t in make_deformed(geometry)]
    maps, offset, mask, weight, bias = tensors

    def convolve(maps, offset, weight):
        return mmcv.ops.deform_conv2d(maps, offset, weight, *geometry).sum((0, 1))

    def modulated(maps, offset, mask, weight, bias):
        return mmcv.ops.modulated_deform_conv2d(maps, offset, mask, weight, bias, *geometry).sum(
            (0, 1)
        )

    assert torch.autograd.gradcheck(convolve, (maps, offset, weight), fast_mode=True)
    assert torch.autograd.gradcheck(modulated, (maps, offset, mask, weight, bias), fast_mode=True)


@pytest.mark.usefixtures('stand_in')
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_mixed_precision(dtype):
    maps, rois = torch.randn(2, 3, 20, 20), make_rois()
    expected = mmcv.ops.roi_align(maps.to(dtype).float(), rois, 3, 0.25, 2)
    found = mmcv.ops.roi_align(maps.to(dtype), rois, 3, 0.25, 2)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype))


@pytest.mark.usefixtures('stand_in')
@pytest.mark.parametrize('name', ['roi_align', 'roi_pool', 'deform', 'modulated'])
def test_strides_are_respected(name):
    """Which mmcv's compiled operators do not: they read channels-last maps as contiguous ones."""
    _, offset, mask, weight, bias = make_deformed(DEFORMED[0])
    rois = make_rois(6)
    run = {
        'roi_align': lambda maps: mmcv.ops.roi_align(maps, rois, 3, 0.1, 2),
        'roi_pool': lambda maps: mmcv.ops.roi_pool(maps, rois, 3, 0.1),
        'deform': lambda maps: mmcv.ops.deform_conv2d(maps, offset, weight, 1, 1),
        'modulated': lambda maps: mmcv.ops.modulated_deform_conv2d(
            maps, offset, mask, weight, bias, 1, 1
        ),
    }[name]
    maps = torch.randn(2, 4, 11, 13)
    expected = output_and_gradients(run, maps)
    found = output_and_gradients(run, maps.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures('stand_in')
def test_an_image_without_boxes():
    boxes, scores = make_boxes(0)
    assert len(mmcv.ops.nms(boxes, scores, 0.5)[1]) == 0
    assert len(mmcv.ops.soft_nms(boxes, scores, 0.5)[1]) == 0
    maps, rois = torch.randn(2, 3, 8, 8), torch.zeros(0, 5)
    for pool in (mmcv.ops.roi_align, mmcv.ops.roi_pool):
        found, gradient = output_and_gradients(lambda x, p=pool: p(x, rois, (3, 4), 0.5), maps)
        assert found.shape == (0, 3, 3, 4)
        assert not gradient.any()


# What it lacks


@pytest.mark.usefixtures('stand_in')
def test_other_operators_say_how_to_compile_them():
    with pytest.raises(RuntimeError, match=r'carafe_forward is not .*\n?.*setup_env.sh --compile'):
        mmcv.ops.carafe(torch.rand(1, 4, 4, 4), torch.rand(1, 9, 8, 8), 3, 1, 2)
    with pytest.raises(RuntimeError, match="roi_align with pool_mode='max' is not available"):
        mmcv.ops.roi_align(torch.rand(1, 4, 4, 4), make_rois(1), 3, 1.0, 2, 'max')

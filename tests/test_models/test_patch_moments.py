# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import math
import os
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch.testing import assert_close

from mmlinglo.models.layers import autocorrelation as module
from mmlinglo.models.layers import chunking
from mmlinglo.models.layers.patch_moments import linear_patch_moments, patch_moments

SIZES = [(1, 1), (1, 2), (2, 1), (1, 5), (4, 1), (2, 2), (2, 3), (3, 3), (4, 5), (7, 7), (6, 8)]


def reference(x):
    """All patches written out, then their mean and covariance."""
    batch_size, channels, height, width = x.shape
    patches = F.unfold(x.reshape(-1, 1, height, width), 3, padding=1)
    patches = patches.view(batch_size, channels, 9, -1).permute(1, 2, 0, 3).flatten(2)
    mean = patches.mean(-1)
    centred = patches - mean.unsqueeze(-1)
    return mean, centred @ centred.transpose(1, 2) / patches.shape[-1]


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients(size, memory_format):
    x = torch.randn(3, 4, *size, dtype=torch.float64) + 2
    x = x.to(memory_format=memory_format).requires_grad_()
    heads = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, 9, dtype=torch.float64)
    results = []
    for function in (patch_moments, reference):
        moments = function(x)
        loss = sum((m * head).sum() for m, head in zip(moments, heads))
        results.append((moments, torch.autograd.grad(loss, x)))
    assert_close(*results, rtol=1e-11, atol=1e-11)


def test_gradcheck():
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(patch_moments, x)


@pytest.mark.parametrize('contiguous', [True, False])
def test_a_linear_layer_and_the_moments_of_its_maps(contiguous, monkeypatch):
    """In chunks of two of five images, with a gradient of the maps from elsewhere."""
    monkeypatch.setattr(chunking, 'CHUNK_ELEMENTS', 2 * 6 * 7 * 4)
    x, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 6, 7, 3), (4, 3), (4,))
    )
    if not contiguous:
        x = x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    heads = [torch.randn(*s, dtype=torch.float64) for s in ((5, 6, 7, 4), (4, 9), (4, 9, 9))]
    maps = F.linear(x, weight, bias)
    expected = (maps, *reference(maps.permute(0, 3, 1, 2)))
    loss = sum((value * head).sum() for value, head in zip(expected, heads))
    gradients = torch.autograd.grad(loss, (x, weight, bias))
    pending = chunking.PendingGradient()
    got = linear_patch_moments(x, weight, bias, pending)
    assert_close(got, expected, rtol=1e-11, atol=1e-11)
    pending.chunks = list(heads[0].split(2))
    loss = sum((value * head).sum() for value, head in zip(got[1:], heads[1:]))
    assert_close(torch.autograd.grad(loss, (x, weight, bias)), gradients, rtol=1e-11, atol=1e-11)
    assert pending.chunks is None


@pytest.mark.parametrize('mean', [0.0, 10.0, 1e3, 1e5])
def test_large_means_do_not_cancel(mean):
    """Where E[x^2] - E[x]^2 in float32 would have lost all digits at 1e5."""
    x = (torch.randn(2, 3, 16, 17) + mean).float()
    _, covariance = patch_moments(x)
    _, expected = reference(x.double())
    # a patch in the interior has no zeros from outside: differences of neighbours are free of the mean
    difference = torch.zeros(9, dtype=torch.float64)
    difference[3], difference[4], difference[5] = 0.5, -1, 0.5
    weights = torch.stack([difference, torch.full((9,), 1 / 9, dtype=torch.float64)])
    for weight in weights:
        got = torch.einsum('k,ckj,j->c', weight, covariance.double(), weight)
        want = torch.einsum('k,ckj,j->c', weight, expected, weight)
        assert_close(got, want, rtol=2e-5, atol=0)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    x = (torch.randn(4, 3, 40, 40) + 3).to(dtype)
    mean, covariance = patch_moments(x)
    assert mean.dtype == covariance.dtype == torch.float32
    assert_close((mean.double(), covariance.double()), reference(x.double()), rtol=1e-4, atol=1e-5)


def test_half_precision_gradients_stay_in_half_precision():
    x = torch.randn(2, 3, 8, 8).half().requires_grad_()
    mean, covariance = patch_moments(x)
    (mean.sum() + covariance.sum()).backward()
    assert x.grad.dtype == torch.float16
    exact = x.detach().double().requires_grad_()
    sum(moment.sum() for moment in reference(exact)).backward()
    assert_close(x.grad.double(), exact.grad, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(
    'shapes',
    [
        [(1, 1, 1, 2), (2, 2, 5, 4)],
        pytest.param([(2, 3, 5, 4), (2, 18, 35, 33)], marks=pytest.mark.slow),  # several blocks
    ],
    ids=['small', 'large'],
)
def test_triton_kernel(shapes):
    """By Triton's interpreter, in a process of its own since it must be chosen before the import."""
    pytest.importorskip('triton')
    code = (
        f'shapes = {shapes}'
        + """
import itertools, torch
from mmlinglo.models.layers.autocorrelation_triton import autocorrelation_triton
torch.manual_seed(0)
for shape in shapes:
    x = torch.randn(shape) + 1
    centre = torch.randn(shape[-1])
    got = autocorrelation_triton(x, centre)
    _, height, width, channels = shape
    y = torch.zeros(shape[0], height + 4, width + 4, channels, dtype=torch.float64)
    y[:, 2:-2, 2:-2] = x.double() - centre.double()
    for down, right in itertools.product(range(5), repeat=2):
        there = y[:, down : down + height, right : right + width]
        want = (y[:, 2:-2, 2:-2] * there).sum((0, 1, 2))
        torch.testing.assert_close(got[:, down, right].double(), want, rtol=1e-4, atol=1e-3)
print('equal')
"""
    )
    env = {**os.environ, 'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.stdout.split() == ['equal'], done.stderr[-2000:]


class OnGPU(torch.Tensor):
    """A CPU tensor that says it were on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(
    ('dtype', 'contiguous', 'on_gpu', 'works', 'kernel'),
    [
        (torch.float32, True, True, True, True),
        (torch.bfloat16, True, True, True, True),
        (torch.float64, True, True, True, False),
        (torch.float32, False, True, True, False),
        (torch.float32, True, False, True, False),
        (torch.float32, True, True, False, False),
    ],
)
def test_when_the_kernel_is_used(monkeypatch, dtype, contiguous, on_gpu, works, kernel):
    calls, devices = [], []
    fake = types.SimpleNamespace(autocorrelation_triton=lambda *args: calls.append(args))
    monkeypatch.setitem(sys.modules, 'mmlinglo.models.layers.autocorrelation_triton', fake)
    monkeypatch.setattr(module, '_triton_works', lambda device: devices.append(device) or works)
    x = torch.randn(2, 6, 5, 4).to(dtype)
    x = x if contiguous else x.transpose(1, 2)
    centre = torch.zeros(4, dtype=torch.promote_types(dtype, torch.float32))
    out = module.autocorrelation(x.as_subclass(OnGPU) if on_gpu else x, centre)
    assert (out is None) is kernel
    if kernel:
        ((given, given_centre),) = calls
        assert isinstance(given, OnGPU)
        assert given_centre is centre
        assert devices == [x.device]


def test_without_a_working_triton_the_convolutions_are_used(monkeypatch, caplog):
    """The probe finds, and says, that nothing can be compiled (here: no GPU)."""
    from mmengine.logging import MMLogger

    if torch.cuda.is_available():
        monkeypatch.setitem(sys.modules, 'mmlinglo.models.layers.autocorrelation_triton', None)
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    try:
        assert not module._triton_works.__wrapped__(torch.device('cpu'))
    finally:
        logger.removeHandler(caplog.handler)
    assert "PyTorch's convolutions are used instead" in caplog.text


def test_chunks_of_images(monkeypatch):
    """On a CPU, as many images at a time as fit the cache, but at least one."""
    monkeypatch.setattr(chunking, 'CHUNK_ELEMENTS', 100)
    for shape, sizes in (
        ((7, 5, 8), [2, 2, 2, 1]),
        ((4, 5, 5), [4]),
        ((2, 30, 30), [1, 1]),
        ((0, 30, 30), [0]),
    ):
        x = torch.arange(math.prod(shape)).view(shape)
        chunks = [x[chunk] for chunk in chunking.image_chunks(x)]
        assert [len(chunk) for chunk in chunks] == sizes
        assert torch.equal(torch.cat(chunks), x)
    elsewhere = torch.empty(7, 30, 30, device='meta')
    assert [elsewhere[chunk].shape for chunk in chunking.image_chunks(elsewhere)] == [(7, 30, 30)]

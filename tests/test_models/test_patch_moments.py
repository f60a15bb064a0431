# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from mmlinglo.models.fast import autocorrelation
from mmlinglo.models.fast.patch_moments import patch_moments

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


def test_chunks_of_images_change_nothing(monkeypatch):
    x = torch.randn(5, 3, 6, 7, dtype=torch.float64)
    for elements in (1, 2 * 3 * 6 * 7, 10**9):
        monkeypatch.setattr(autocorrelation, 'CHUNK_ELEMENTS', elements)
        assert_close(patch_moments(x), reference(x), rtol=1e-11, atol=1e-11)


def test_second_derivatives():
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(patch_moments, x)


def test_batched_gradients():
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    one_by_one, batched = (
        torch.autograd.functional.jacobian(patch_moments, x, vectorize=vectorize)
        for vectorize in (False, True)
    )
    assert_close(batched, one_by_one, rtol=1e-11, atol=1e-11)


def test_tensors_without_data_leave_nothing_behind():
    x = torch.randn(2, 3, 23, 29, dtype=torch.float64)  # a size of this test alone
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        patch_moments(mode.from_tensor(x))
    assert_close(patch_moments(x), reference(x), rtol=1e-11, atol=1e-11)

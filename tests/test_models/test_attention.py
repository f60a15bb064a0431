# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from reference import key_only_attention
from torch.testing import assert_close

from mmlinglo.models import KeyOnlyAttention, literal


def random_attention(embed_dims=12, num_heads=3, **kwargs):
    attn = KeyOnlyAttention(embed_dims, num_heads, **kwargs)
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter)
    return attn.double()


def reference(attn, x):
    def weights(linear):
        bias = 0.0 if linear.bias is None else linear.bias.detach().numpy()
        return linear.weight.detach().numpy().T, bias

    layers = [array for name in ('key', 'value') for array in weights(getattr(attn, name))]
    tail = [array for name in ('mix', 'proj') for array in weights(getattr(attn, name))]
    saliency = attn.saliency.detach().numpy()
    return np.stack([key_only_attention(image.numpy(), *layers, saliency, *tail) for image in x])


@pytest.mark.parametrize('num_heads', [1, 3, 12])
@pytest.mark.parametrize('qkv_bias', [True, False])
@pytest.mark.parametrize('num_tokens', [1, 7, 40])
@pytest.mark.parametrize('batch_size', [1, 2, 3])
def test_matches_the_paper(num_heads, qkv_bias, num_tokens, batch_size):
    """As it is written, and rewritten, which pays from 16 tokens on."""
    attn = random_attention(num_heads=num_heads, qkv_bias=qkv_bias)
    x = torch.randn(batch_size, num_tokens, 12, dtype=torch.float64)
    expected = torch.from_numpy(reference(attn, x))
    assert_close(attn(x).detach(), expected, rtol=1e-10, atol=1e-10)
    with literal():
        assert_close(attn(x).detach(), expected, rtol=1e-10, atol=1e-10)


def test_names_and_shapes():
    attn = KeyOnlyAttention(64, 2)
    shapes = {name: tuple(p.shape) for name, p in attn.named_parameters()}
    assert shapes == {
        'saliency': (2, 32),
        **{f'{n}.weight': (64, 64) for n in ('key', 'value', 'mix', 'proj')},
        **{f'{n}.bias': (64,) for n in ('key', 'value', 'mix', 'proj')},
    }
    without = dict(KeyOnlyAttention(64, 2, qkv_bias=False).named_parameters())
    assert set(shapes) - set(without) == {'key.bias', 'value.bias'}


def test_images_of_a_batch_are_independent():
    attn = random_attention()
    x = torch.randn(3, 10, 12, dtype=torch.float64)
    assert_close(attn(x)[1:2], attn(x[1:2]))


def test_permuting_tokens_permutes_the_output():
    attn = random_attention()
    x = torch.randn(1, 10, 12, dtype=torch.float64)
    order = torch.randperm(10)
    assert_close(attn(x[:, order]), attn(x)[:, order])


def test_weights_sum_to_one_per_head():
    attn = random_attention()
    weights = attn.saliency_weights(torch.randn(2, 10, 12, dtype=torch.float64))
    assert weights.shape == (2, 3, 10)
    assert_close(weights.sum(-1), torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('autocast', [True, False])
@pytest.mark.parametrize('rewritten', [True, False])
def test_half_precision_over_more_positions_than_float16_can_count(dtype, autocast, rewritten):
    """Stage 1 of a 1333x800 image, with keys so large that a plain half-precision sum overflows.

    What remains against float64 is the rounding of inputs, weights and outputs, not of 66,800 additions.
    """
    attn = KeyOnlyAttention(64, 1)
    torch.nn.init.constant_(attn.key.bias, 30.0)
    attn.to(dtype)  # the truth has the rounded weights and inputs
    x = torch.randn(1, 334 * 200, 64).to(dtype)
    with torch.no_grad():
        with literal():
            truth = attn.double()(x.double())
        attn.to(torch.float32 if autocast else dtype)
        with torch.autocast('cpu', dtype=dtype, enabled=autocast):
            x = x.to(attn.key.weight.dtype)
            weights = attn.saliency_weights(x)
            with nullcontext() if rewritten else literal():
                out = attn(x)
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert weights.dtype == torch.float32
    assert_close(weights.sum(-1), torch.ones(1, 1), rtol=1e-4, atol=0)
    error = (out.double() - truth).abs().max() / truth.abs().max()
    assert error < 4 * torch.finfo(dtype).eps


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match='num_heads=5 must divide embed_dims=64'):
        KeyOnlyAttention(64, 5)


@pytest.mark.parametrize('name', ['embed_dims', 'num_heads'])
def test_arguments_are_named_in_errors(name):
    for value, error in ((0, ValueError), (2.0, TypeError)):
        arguments = {'embed_dims': 4, 'num_heads': 2, name: value}
        with pytest.raises(error, match=rf'^{name} must be .* of at least 1, got {value}$'):
            KeyOnlyAttention(**arguments)
    assert KeyOnlyAttention(1, 1)(torch.ones(1, 2, 1)).shape == (1, 2, 1)


def test_saliency_starts_small():
    assert KeyOnlyAttention(1024, 4).saliency.std().item() == pytest.approx(0.02, rel=0.1)

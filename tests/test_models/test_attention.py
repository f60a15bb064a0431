# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import copy

import numpy as np
import pytest
import torch
from reference import key_only_attention
from torch.testing import assert_close

from mmlinglo.models import DotProductAttention, KeyOnlyAttention


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


ORDERS = pytest.mark.parametrize('order', ['_forward_literal', '_forward_folded'])


def deployed(attn):
    attn = copy.deepcopy(attn).eval()
    attn.switch_to_deploy()
    return attn


@pytest.mark.parametrize('num_heads', [1, 3, 12])
@pytest.mark.parametrize('qkv_bias', [True, False])
@pytest.mark.parametrize('num_tokens', [1, 7, 40])
@ORDERS
def test_matches_the_paper(num_heads, qkv_bias, num_tokens, order):
    attn = random_attention(num_heads=num_heads, qkv_bias=qkv_bias)
    x = torch.randn(2, num_tokens, 12, dtype=torch.float64)
    expected = torch.from_numpy(reference(attn, x))
    assert_close(getattr(attn, order)(x).detach(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('qkv_bias', [True, False])
@pytest.mark.parametrize('order', ['_forward_spared', '_forward_folded', 'forward'])
def test_deployed_form_matches_the_paper(qkv_bias, order):
    attn = random_attention(qkv_bias=qkv_bias)
    for num_tokens in (5, 40):
        x = torch.randn(2, num_tokens, 12, dtype=torch.float64)
        expected = torch.from_numpy(reference(attn, x))
        assert_close(getattr(deployed(attn), order)(x).detach(), expected, rtol=1e-10, atol=1e-10)


def test_products_follow_the_weights():
    """After loading, training and casting; state dict and parameters are those of the training form."""
    attn, other = random_attention(), random_attention()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    expected = torch.from_numpy(reference(other, x))
    model = deployed(attn)
    assert list(model.state_dict()) == list(attn.state_dict())
    assert dict(model.named_parameters()).keys() == dict(attn.named_parameters()).keys()
    model.load_state_dict(other.state_dict())
    assert_close(model(x).detach(), expected, rtol=1e-10, atol=1e-10)

    model = deployed(attn).train()
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), other.parameters()):
            ours.copy_(theirs)
    assert_close(model(x).detach(), expected, rtol=1e-10, atol=1e-10)  # training: made anew
    assert_close(model.eval()(x).detach(), expected, rtol=1e-10, atol=1e-10)
    assert model.float()(x.float()).dtype == torch.float32


def test_deployed_form_computes_no_products(monkeypatch):
    attn = deployed(random_attention())
    monkeypatch.setattr(KeyOnlyAttention, '_precompute', lambda _: pytest.fail('made again'))
    multiplied = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if getattr(function, '__name__', '') in ('matmul', '__matmul__', 'linear'):
                multiplied.append({tuple(a.shape) for a in args if isinstance(a, torch.Tensor)})
            return function(*args, **(kwargs or {}))

    with Watch():
        attn(torch.randn(2, 7, 12, dtype=torch.float64))
    assert multiplied
    assert {(12, 12)} not in multiplied  # no weight with a weight


@pytest.mark.parametrize('qkv_bias', [True, False])
def test_both_orders_have_the_same_gradients(qkv_bias):
    attn = random_attention(qkv_bias=qkv_bias)
    x = torch.randn(2, 20, 12, dtype=torch.float64, requires_grad=True)
    head = torch.randn(2, 20, 12, dtype=torch.float64)
    inputs = {'x': x, **dict(attn.named_parameters())}
    literal, folded = (
        dict(zip(inputs, torch.autograd.grad((order(x) * head).sum(), list(inputs.values()))))
        for order in (attn._forward_literal, attn._forward_folded)
    )
    # no gradient reaches the saliency through a constant: they are there and not all zero
    assert all(gradient.abs().max() > 1e-6 for gradient in literal.values())
    assert_close(folded, literal, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ('shape', 'folded'),
    [((8, 3136, 64), True), ((1, 16800, 128), True), ((8, 196, 160), True), ((8, 49, 512), False),
     ((1, 196, 160), False), ((1, 1050, 512), True)],
)  # fmt: skip
def test_order_follows_the_shape(shape, folded, monkeypatch):
    attn = KeyOnlyAttention(shape[-1], 1)
    assert deployed(attn)._folding_pays(torch.empty(shape, device='meta')) == (shape[1] > shape[2])
    taken = []
    for order in ('_forward_literal', '_forward_folded'):
        monkeypatch.setattr(attn, order, lambda x, _, order=order: taken.append(order) or x)
    attn(torch.empty(shape, device='meta'))
    assert taken == ['_forward_folded' if folded else '_forward_literal']


@pytest.mark.parametrize('batch_size', [1, 2, 5])
@pytest.mark.parametrize('channels', [4, 12])
def test_order_changes_where_its_cost_does(batch_size, channels):
    """Multiply-adds as the class counts them, at each number of tokens around the change."""
    attn = KeyOnlyAttention(channels, 1)
    prepared = deployed(attn)
    taken = []
    for tokens in range(1, 4 * channels):
        x = torch.empty(batch_size, tokens, channels, device='meta')
        literal = 4 * batch_size * tokens * channels**2
        folded = batch_size * (tokens * channels**2 + channels**3) + 2 * channels**3
        taken.append(attn._folding_pays(x))
        assert taken[-1] == (8 * folded < 5 * literal), tokens
        assert prepared._folding_pays(x) == (tokens > channels)
    assert set(taken) == {True, False}


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


@ORDERS
def test_gradients(order):
    attn = random_attention(embed_dims=4, num_heads=2)
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(getattr(attn, order), x)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('autocast', [True, False])
@pytest.mark.parametrize('order', ['_forward_literal', '_forward_folded', '_forward_spared'])
def test_half_precision_over_more_positions_than_float16_can_count(dtype, autocast, order):
    """Stage 1 of a 1333x800 image, with keys so large that a plain half-precision sum overflows.

    What remains against float64 is the rounding of inputs, weights and outputs, not of 66,800 additions.
    """
    attn = KeyOnlyAttention(64, 1)
    torch.nn.init.constant_(attn.key.bias, 30.0)
    attn.to(dtype)  # the truth has the rounded weights and inputs
    x = torch.randn(1, 334 * 200, 64).to(dtype)
    with torch.no_grad():
        truth = attn.double()._forward_literal(x.double())
        if autocast:
            attn.float()
            if order == '_forward_spared':
                attn = deployed(attn)
            with torch.autocast('cpu', dtype=dtype):
                weights, out = attn.saliency_weights(x.float()), getattr(attn, order)(x.float())
        else:
            attn.to(dtype)
            if order == '_forward_spared':
                attn = deployed(attn)
            weights, out = attn.saliency_weights(x), getattr(attn, order)(x)
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert weights.dtype == torch.float32
    assert_close(weights.sum(-1), torch.ones(1, 1), rtol=1e-4, atol=0)
    error = (out.double() - truth).abs().max() / truth.abs().max()
    assert error < 4 * torch.finfo(dtype).eps


def test_the_folded_order_is_as_precise_in_half_precision():
    for dtype in (torch.float16, torch.bfloat16):
        attn = KeyOnlyAttention(64, 2).to(dtype)
        x = torch.randn(2, 500, 64).to(dtype)
        with torch.no_grad():
            truth = attn.double()._forward_literal(x.double())
            attn.to(dtype)
            errors = [
                (order(x).double() - truth).square().mean().sqrt().item()
                for order in (attn._forward_literal, attn._forward_folded)
            ]
        assert errors[1] <= errors[0]


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match='num_heads=5 for embed_dims=64'):
        KeyOnlyAttention(64, 5)


@pytest.mark.parametrize('attention', [KeyOnlyAttention, DotProductAttention])
@pytest.mark.parametrize('name', ['embed_dims', 'num_heads'])
def test_arguments_are_named_in_errors(attention, name):
    for value, error in ((0, ValueError), (2.0, TypeError)):
        arguments = {'embed_dims': 4, 'num_heads': 2, name: value}
        with pytest.raises(error, match=rf'^{name} must be .* of at least 1, got {value}$'):
            attention(**arguments)
    assert attention(1, 1)(torch.ones(1, 2, 1)).shape == (1, 2, 1)


def test_repr_says_which_form_it_is():
    attn = KeyOnlyAttention(12, 3).eval()
    assert attn.extra_repr() == 'embed_dims=12, num_heads=3, deploy=False'
    attn.switch_to_deploy()
    assert attn.extra_repr() == 'embed_dims=12, num_heads=3, deploy=True'


def test_saliency_starts_small():
    assert KeyOnlyAttention(1024, 4).saliency.std().item() == pytest.approx(0.02, rel=0.1)

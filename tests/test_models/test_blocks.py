# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import copy

import pytest
import torch
import torch.nn.utils.prune
from conftest import randomize_norms_
from torch.testing import assert_close

from mmlinglo.models.layers import FFN, ConditionalPositionalEncoding, blocks, chunking
from mmlinglo.models.layers.positional_encoding import has_hooks


def ffn_for_inference(deploy=True, channels=4, hidden=8):
    encoding = ConditionalPositionalEncoding(hidden, deploy=deploy)
    return randomize_norms_(FFN(channels, hidden, encoding)).eval()


def layer_by_layer(ffn, x):
    """In float64, so that it is the plain order of any form."""
    ffn = copy.deepcopy(ffn).double()
    hidden = ffn.pos_encoding(ffn.fc1(x.double()).permute(0, 3, 1, 2))
    return ffn.fc2(torch.nn.functional.gelu(hidden).permute(0, 2, 3, 1)).float()


@pytest.mark.parametrize('deploy', [True, False])
@pytest.mark.parametrize('size', [(1, 9), (7, 5), (16, 3), (33, 2)])
@pytest.mark.parametrize('band_elements', [8, 100, 400, 10**6])
def test_fused_inference_in_bands_changes_nothing(deploy, size, band_elements, monkeypatch):
    """Bands of one row, of several, more bands than rows, and the whole batch at once."""
    ffn = ffn_for_inference(deploy)
    x = torch.randn(2, *size, 4)
    expected = layer_by_layer(ffn, x).detach()
    monkeypatch.setattr(blocks, 'CHUNK_ELEMENTS', band_elements)
    rows = []
    hidden = ffn._hidden
    monkeypatch.setattr(
        ffn, '_hidden', lambda band, *kernel: rows.append(band.shape[1]) or hidden(band, *kernel)
    )
    with torch.no_grad():
        assert_close(ffn(x), expected, rtol=1e-4, atol=1e-5)
    if band_elements == 10**6:
        assert rows == [size[0]]
    elif size[0] * size[1] * 8 > band_elements and size[0] > 1:
        assert len(rows) > 2
        assert max(rows) < size[0]


@pytest.mark.parametrize('mode', ['train', 'masked', 'norm_eval', 'deploy'])
def test_training_by_images_changes_nothing(mode, monkeypatch):
    """Outputs, all gradients and running statistics, against PyTorch's graph of the whole batch."""
    ours = FFN(4, 8, ConditionalPositionalEncoding(8, deploy=mode == 'deploy')).double()
    if mode == 'norm_eval':
        randomize_norms_(ours)
        for branch in ours.pos_encoding.branches:
            branch.bn.eval()
    theirs = copy.deepcopy(ours)
    x = torch.randn(5, 6, 7, 4, dtype=torch.float64) + 1
    head = torch.randn_like(x)
    outside = torch.rand(5, 6, 7, 1) < 0.3 if mode == 'masked' else None
    results = []
    for ffn, chunk_elements in ((ours, 2 * 6 * 7 * 8), (theirs, 10**9)):
        for module in (blocks, chunking):
            monkeypatch.setattr(module, 'CHUNK_ELEMENTS', chunk_elements)
        leaf = x.clone().requires_grad_()
        assert ffn._images_pay(leaf) == (ffn is ours)
        out = ffn(leaf, outside)
        inputs = {'x': leaf, **dict(ffn.named_parameters())}
        gradients = torch.autograd.grad((out * head).sum(), list(inputs.values()))
        results.append((out, dict(zip(inputs, gradients))))
    assert_close(*results, rtol=1e-10, atol=1e-10)
    assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-10, atol=1e-10)


def test_training_by_images_in_half_precision(monkeypatch):
    """In bfloat16 altogether: gradients near those of float64."""
    for module in (blocks, chunking):
        monkeypatch.setattr(module, 'CHUNK_ELEMENTS', 2 * 6 * 7 * 8)
    half = FFN(4, 8, ConditionalPositionalEncoding(8)).bfloat16()
    exact = copy.deepcopy(half).double()
    x = torch.randn(5, 6, 7, 4).bfloat16()
    head = torch.randn(x.shape).bfloat16()
    for ffn in (half, exact):
        dtype = ffn.fc1.weight.dtype
        leaf = x.to(dtype).requires_grad_()
        assert ffn._images_pay(leaf)
        (ffn(leaf) * head.to(dtype)).sum().backward()
    for (name, ours), theirs in zip(half.named_parameters(), exact.parameters()):
        assert ours.grad.dtype == torch.bfloat16
        # batch norm takes out what the gradient of a bias before it has but for rounding
        scale = theirs.grad.norm() if name != 'fc1.bias' else exact.fc1.weight.grad.norm()
        assert (ours.grad - theirs.grad).norm() < 0.03 * scale, name


def test_training_by_images_keeps_only_the_hidden_map(monkeypatch):
    """Besides what the first linear layer keeps, which is its input."""
    for module in (blocks, chunking):
        monkeypatch.setattr(module, 'CHUNK_ELEMENTS', 2**14)
    ffn = FFN(4, 32, ConditionalPositionalEncoding(32)).train()
    x = torch.randn(4, 40, 40, 4, requires_grad=True)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ffn(x)
    hidden = 4 * 4 * 40 * 40 * 32
    assert hidden <= sum(kept.values()) < 1.4 * hidden


def test_frozen_parts_are_left_out_of_the_gradients(monkeypatch):
    for module in (blocks, chunking):
        monkeypatch.setattr(module, 'CHUNK_ELEMENTS', 64)
    ffn = FFN(4, 8, ConditionalPositionalEncoding(8)).train()
    ffn.fc1.requires_grad_(False)
    ffn(torch.randn(3, 6, 7, 4)).sum().backward()
    assert ffn.fc1.weight.grad is None
    assert all(p.grad is not None for p in ffn.pos_encoding.parameters())


def test_fused_only_where_the_result_is_the_same():
    """Not with gradients, batch statistics, a captured graph, excitation, nor in other dtypes."""
    x = torch.randn(1, 8, 8, 4)
    ffn = ffn_for_inference()
    assert not ffn._fusing_pays(x)  # gradients
    with torch.no_grad():
        assert ffn._fusing_pays(x)
        with torch.autocast('cpu'):
            assert not ffn._fusing_pays(x)
        assert not ffn._fusing_pays(x.to('meta'))
        assert not ffn._fusing_pays(x.double())
        with torch.backends.mkldnn.flags(enabled=False):
            assert not ffn._fusing_pays(x)
        training_form = FFN(4, 8, ConditionalPositionalEncoding(8))
        assert not training_form._fusing_pays(x)
        assert training_form.eval()._fusing_pays(x)
        excited = FFN(4, 8, ConditionalPositionalEncoding(8, deploy=True), torch.nn.Sigmoid())
        assert not excited._fusing_pays(x)
        traced = torch.jit.trace(ffn, x)
        assert 'mkldnn::' not in str(traced.graph)
        assert_close(traced(x[:, :5]), ffn(x[:, :5]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['fc1', 'pos_encoding', 'pos_encoding.reparam', 'act', 'fc2'])
def test_hooks_see_their_modules_called(name, monkeypatch):
    """In training by images and in fused inference, either of which calls none of these by itself."""
    for module in (blocks, chunking):
        monkeypatch.setattr(module, 'CHUNK_ELEMENTS', 64)
    ffn = ffn_for_inference()
    x = torch.randn(1, 8, 8, 4)
    calls = []
    handle = ffn.get_submodule(name).register_forward_hook(lambda *_: calls.append(name))
    with torch.no_grad():
        hooked = ffn(x)
    ffn(x).sum().backward()
    assert len(calls) == 2
    handle.remove()
    with torch.no_grad():
        assert_close(ffn(x), hooked, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', ['forward', 'forward_pre', 'full_backward', 'full_backward_pre'])
def test_hooks_of_each_kind_are_seen(kind):
    ffn = ffn_for_inference()
    assert not has_hooks(ffn)
    getattr(ffn.fc2, f'register_{kind}_hook')(lambda *_: None)
    assert has_hooks(ffn)


def test_pruned_weights_are_used():
    """Pruning makes the weight anew before each call."""
    ffn = ffn_for_inference()
    torch.nn.utils.prune.random_unstructured(ffn.fc2, 'weight', 0.5)
    x = torch.randn(1, 8, 8, 4)
    with torch.no_grad():
        ffn.fc2.weight_mask.zero_()
        assert_close(ffn(x), ffn.fc2.bias.expand(1, 8, 8, 4))


def test_operations_are_counted_one_by_one():
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(1, 8, 8, 4)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ffn_for_inference()(x)
    assert counter.get_total_flops() == 2 * 64 * (4 * 8 + 9 * 8 + 8 * 4)

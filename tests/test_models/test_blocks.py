# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import copy

import pytest
import torch
from conftest import randomize_norms_
from torch.testing import assert_close

from mmlinglo.models.layers import FFN, ConditionalPositionalEncoding, blocks, chunking


def deployed_ffn(channels=4, hidden=8):
    encoding = ConditionalPositionalEncoding(hidden, deploy=True)
    return FFN(channels, hidden, encoding).double().eval()


@pytest.mark.parametrize('size', [(1, 9), (7, 5), (16, 3), (33, 2)])
@pytest.mark.parametrize('band_elements', [8, 100, 400])
def test_bands_change_nothing(size, band_elements, monkeypatch):
    """Bands of one row, of several, and more bands than rows, against the whole map at once."""
    ffn = deployed_ffn()
    x = torch.randn(2, *size, 4, dtype=torch.float64)
    expected = ffn.fc2(ffn._hidden(x)).detach()
    monkeypatch.setattr(blocks, 'CHUNK_ELEMENTS', band_elements)
    rows = []
    hidden = ffn._hidden
    monkeypatch.setattr(ffn, '_hidden', lambda band: rows.append(band.shape[1]) or hidden(band))
    with torch.no_grad():
        assert_close(ffn(x), expected, rtol=1e-12, atol=1e-12)
    if size[0] * size[1] * 8 > band_elements and size[0] > 1:
        assert len(rows) > 2
        assert max(rows) < size[0]


@pytest.mark.parametrize('mode', ['train', 'norm_eval', 'deploy'])
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
    results = []
    for ffn, chunk_elements in ((ours, 2 * 6 * 7 * 8), (theirs, 10**9)):
        for module in (blocks, chunking):
            monkeypatch.setattr(module, 'CHUNK_ELEMENTS', chunk_elements)
        leaf = x.clone().requires_grad_()
        assert ffn._images_pay(leaf) == (ffn is ours)
        out = ffn(leaf)
        inputs = {'x': leaf, **dict(ffn.named_parameters())}
        gradients = torch.autograd.grad((out * head).sum(), list(inputs.values()))
        results.append((out, dict(zip(inputs, gradients))))
    assert_close(*results, rtol=1e-10, atol=1e-10)
    assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-10, atol=1e-10)


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


def test_bands_only_where_the_result_is_the_same(monkeypatch):
    """Not with gradients, in other forms than the deployed one, in a captured graph, for small maps."""
    monkeypatch.setattr(blocks, 'CHUNK_ELEMENTS', 64)
    x = torch.randn(1, 8, 8, 4, dtype=torch.float64)
    ffn = deployed_ffn()
    assert not ffn._bands_pay(x)  # gradients
    with torch.no_grad():
        assert ffn._bands_pay(x)
        assert not ffn._bands_pay(x[:, :2, :2])
        with torch.autocast('cpu'):
            assert not ffn._bands_pay(x)
        assert not ffn._bands_pay(x.to('meta'))
        training_form = FFN(4, 8, ConditionalPositionalEncoding(8)).double().eval()
        assert not training_form._bands_pay(x)
        excited = FFN(4, 8, ConditionalPositionalEncoding(8, deploy=True), torch.nn.Sigmoid())
        assert not excited._bands_pay(x)
        traced = torch.jit.trace(ffn, x)
        assert 'cat' not in str(traced.graph)
        assert_close(traced(x[:, :5]), ffn(x[:, :5]))

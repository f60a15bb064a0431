# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Inference of the feed-forward network on a CPU."""

import copy

import pytest
import torch
from conftest import randomize_norms_
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from mmlinglo.models import ConditionalPositionalEncoding, fast


def ffn_for_inference(deploy):
    encoding = ConditionalPositionalEncoding(8, deploy=deploy)
    return randomize_norms_(fast.FFN(4, 8, encoding, None)).eval()


def layer_by_layer(ffn, x):
    """In float64, by torch's own functions."""
    ffn = copy.deepcopy(ffn).double()
    hidden = ffn.pos_encoding(ffn.fc1(x.double()).permute(0, 3, 1, 2))
    return ffn.fc2(torch.nn.functional.gelu(hidden).permute(0, 2, 3, 1)).float()


@pytest.mark.parametrize('deploy', [True, False])
@pytest.mark.parametrize('size', [(1, 9), (7, 5), (16, 3), (33, 2)])
@pytest.mark.parametrize('band_elements', [8, 100, 400, 10**6])
def test_bands_change_nothing(deploy, size, band_elements, monkeypatch):
    """Bands of one row, of several, more bands than rows, and the whole batch at once."""
    ffn = ffn_for_inference(deploy)
    x = torch.randn(2, *size, 4)
    expected = layer_by_layer(ffn, x).detach()
    monkeypatch.setattr(fast.ffn, 'CHUNK_ELEMENTS', band_elements)
    rows, convolve = [], fast.onednn.depthwise_conv_gelu
    monkeypatch.setattr(
        fast.onednn,
        'depthwise_conv_gelu',
        lambda x, *args: rows.append(x.shape[2]) or convolve(x, *args),
    )
    with torch.no_grad():
        assert_close(ffn(x), expected, rtol=1e-4, atol=1e-5)
    if band_elements == 10**6:
        assert rows == [size[0]]
    elif size[0] * size[1] * 8 > band_elements and size[0] > 1:
        assert len(rows) > 2
        assert max(rows) < size[0]


def test_biases_of_any_stride():
    ffn = ffn_for_inference(True)
    ffn.fc1.bias.data = torch.randn(16)[::2]
    ffn.fc2.bias.data = torch.ones(1).expand(4)
    ffn.pos_encoding.reparam.bias.data = torch.randn(16)[::2]
    x = torch.randn(2, 7, 5, 4)
    with torch.no_grad():
        assert_close(ffn(x), layer_by_layer(ffn, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('deploy', [True, False])
def test_operations_are_counted_and_traced_one_by_one(deploy):
    ffn, x = ffn_for_inference(deploy), torch.randn(1, 8, 8, 4)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ffn(x)
    convolutions = 1 if deploy else 4  # the counter hooks all modules, so the definition runs
    assert counter.get_total_flops() == 2 * 64 * (4 * 8 + convolutions * 9 * 8 + 8 * 4)
    with torch.no_grad():
        expected = ffn(x[:, :5])
        traced = torch.jit.trace(ffn, x)
    assert 'mkldnn::' not in str(traced.graph)
    assert_close(traced(x[:, :5]), expected, rtol=1e-4, atol=1e-5)

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import pytest
import torch
from torch.testing import assert_close

from mmlinglo.models.layers import FFN, ConditionalPositionalEncoding, blocks


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
    monkeypatch.setattr(blocks, 'BAND_ELEMENTS', band_elements)
    rows = []
    hidden = ffn._hidden
    monkeypatch.setattr(ffn, '_hidden', lambda band: rows.append(band.shape[1]) or hidden(band))
    with torch.no_grad():
        assert_close(ffn(x), expected, rtol=1e-12, atol=1e-12)
    if size[0] * size[1] * 8 > band_elements and size[0] > 1:
        assert len(rows) > 2
        assert max(rows) < size[0]


def test_bands_only_where_the_result_is_the_same(monkeypatch):
    """Not with gradients, in other forms than the deployed one, in a captured graph, for small maps."""
    monkeypatch.setattr(blocks, 'BAND_ELEMENTS', 64)
    x = torch.randn(1, 8, 8, 4, dtype=torch.float64)
    ffn = deployed_ffn()
    assert not ffn._bands_pay(x)  # gradients
    with torch.no_grad():
        assert ffn._bands_pay(x)
        assert not ffn._bands_pay(x[:, :2, :2])
        assert not ffn._bands_pay(x.to('meta'))
        training_form = FFN(4, 8, ConditionalPositionalEncoding(8)).double().eval()
        assert not training_form._bands_pay(x)
        excited = FFN(4, 8, ConditionalPositionalEncoding(8, deploy=True), torch.nn.Sigmoid())
        assert not excited._bands_pay(x)
        traced = torch.jit.trace(ffn, x)
        assert 'cat' not in str(traced.graph)
        assert_close(traced(x[:, :5]), ffn(x[:, :5]))

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import import_tool
from torch import nn

tool = import_tool('tools/analysis_tools/measure_padding.py')


class MeanOfAll(nn.Module):
    """Last map: the mean of the whole picture, at each position of stride 32."""

    def forward(self, x):
        last = F.avg_pool2d(x, 32)
        return [x, x.mean((2, 3), keepdim=True).expand_as(last)]


def test_shift_of_a_mean():
    """Padding to twice the width halves the mean, to four times quarters it."""
    image = torch.rand(3, 32, 64)
    assert tool.measure_shift(MeanOfAll(), image, 64) == pytest.approx(0.5)
    assert tool.measure_shift(MeanOfAll(), image, 192) == pytest.approx(0.75)
    assert tool.measure_shift(MeanOfAll(), image, 0) == 0


def test_only_the_left_half_counts():
    class Local(nn.Module):
        def forward(self, x):
            return [F.avg_pool2d(x, (32, 65), 32, padding=(0, 32))]  # sees 32 pixels more on a side

    assert tool.measure_shift(Local(), torch.rand(3, 32, 128), 32) == 0


def test_shifts_of_the_backbones(monkeypatch):
    monkeypatch.setattr(tool, 'SIZE', 64)
    rows = list(tool.measure_shifts([64], seeds=2))
    assert [row['backbone'] for row in rows] == list(tool.BACKBONES)
    for row in rows:
        assert row['shift_min'] <= row['shift'] <= row['shift_max']
        expected = row['shift'] < 1e-3 if 'mask' in row['backbone'] else row['shift'] > 1
        assert expected, row


def test_cost_compares_the_same_work(monkeypatch):
    monkeypatch.setattr(tool, 'SIZES', [(64, 96), (64, 64)])
    row = tool.measure_cost('cpu', rounds=2)
    assert row['work'] == 'inference'
    assert row['ratio'] == pytest.approx(row['masked_ms'] / row['plain_ms'])


def test_tool(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tool, 'SIZES', [(64, 96), (64, 64)])
    args = '--paddings 32 --seeds 1 --rounds 2 --device cpu --out'
    assert tool.main([*args.split(), str(tmp_path / 'new/out')]) == 0
    rows = json.loads((tmp_path / 'new/out.json').read_text())['rows']
    assert [row.get('backbone') for row in rows] == [*tool.BACKBONES, None]
    assert '| LinGlo-b0 with mask_padding | 32 ' in capsys.readouterr().out
    for option, least in (('--seeds', 1), ('--paddings', 0)):
        with pytest.raises(SystemExit):
            tool.main([option, '-1'])
        assert f'{option}: must be at least {least}, got -1' in capsys.readouterr().err

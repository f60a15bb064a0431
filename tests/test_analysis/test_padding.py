# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import import_tool
from torch import nn

from mmlinglo.analysis.padding import BACKBONES, measure_cost, measure_shift, measure_shifts


class MeanOfAll(nn.Module):
    """Last map: the mean of the whole picture, at each position of stride 32."""

    def forward(self, x):
        last = F.avg_pool2d(x, 32)
        return [x, x.mean((2, 3), keepdim=True).expand_as(last)]


def test_shift_of_a_mean():
    """Padding to twice the width halves the mean, to four times quarters it."""
    image = torch.rand(3, 32, 64)
    assert measure_shift(MeanOfAll(), image, 64) == pytest.approx(0.5)
    assert measure_shift(MeanOfAll(), image, 192) == pytest.approx(0.75)
    assert measure_shift(MeanOfAll(), image, 0) == 0


def test_only_the_left_half_counts():
    class Local(nn.Module):
        def forward(self, x):
            return [F.avg_pool2d(x, (32, 65), 32, padding=(0, 32))]  # sees 32 pixels more on a side

    assert measure_shift(Local(), torch.rand(3, 32, 128), 32) == 0


@pytest.mark.parametrize(('width', 'padding', 'message'), [(96, 32, 'got 96'), (64, -1, 'got -1')])
def test_wrong_input(width, padding, message):
    with pytest.raises(ValueError, match=message):
        measure_shift(MeanOfAll(), torch.rand(3, 32, width), padding)


def test_shifts_of_the_backbones():
    rows = list(measure_shifts([64], size=64, seeds=range(2)))
    assert [row['backbone'] for row in rows] == list(BACKBONES)
    for row in rows:
        assert row['shift_min'] <= row['shift'] <= row['shift_max']
        expected = row['shift'] < 1e-3 if 'mask' in row['backbone'] else row['shift'] > 1
        assert expected, row


def test_cost_compares_the_same_work():
    rows = measure_cost([(64, 96), (64, 64)], rounds=2)
    assert [row['work'] for row in rows] == ['inference']
    for row in rows:
        assert row['ratio'] == pytest.approx(row['masked_ms'] / row['plain_ms'])
    with pytest.raises(ValueError, match='got 1'):
        measure_cost([(64, 96)], rounds=1)


def test_tool(monkeypatch, tmp_path, capsys):
    tool = import_tool('tools/analysis_tools/measure_padding.py')
    monkeypatch.setattr(tool, 'SIZES', [(64, 96), (64, 64)])
    args = '--paddings 32 --seeds 1 --rounds 2 --device cpu --out'
    assert tool.main([*args.split(), str(tmp_path / 'new/out')]) == 0
    rows = json.loads((tmp_path / 'new/out.json').read_text())['rows']
    assert [row.get('backbone') for row in rows] == [*BACKBONES, None]
    assert '| LinGlo-b0 with mask_padding | 32 ' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tool.main(['--seeds', '0'])
    assert '--seeds: must be at least 1, got 0' in capsys.readouterr().err

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""A GPU's checks, rehearsed on the CPU."""

import json

import pytest
import torch
from conftest import import_tool

from mmlinglo.analysis import gpu_checks
from mmlinglo.models.fast.grouped import GroupedPositionalEncoding
from mmlinglo.utils.cli import UsageError

tool = import_tool('tools/analysis_tools/check_gpu.py')


def rows_of(tmp_path, what):
    out = tmp_path / what
    tool.main([what, '--rehearse', '--rounds', '2', '--device', 'cpu', '--out', str(out)])
    return json.loads(out.with_suffix('.json').read_text())['rows']


@pytest.fixture
def one_variant(monkeypatch):
    monkeypatch.setattr(gpu_checks, 'VARIANTS', {'C-C-H-H': dict(layout='C-C-H-H')})


@pytest.mark.slow
@pytest.mark.usefixtures('one_variant')
def test_checks(tmp_path, capsys):
    rows = rows_of(tmp_path, 'checks')
    assert {row['verdict'] for row in rows} == {'met'}
    names = {row['check'] for row in rows}
    assert {'C-C-H-H, training', 'deployed', 'torch.compile', 'SyncBN, process 1 of 1'} <= names
    assert all(row['error'] < 1e-4 for row in rows if row['at_most'] == gpu_checks.AT_MOST)
    assert '| C-C-H-H, training' in capsys.readouterr().out


@pytest.mark.usefixtures('one_variant')
def test_a_wrong_form_is_found(tmp_path, monkeypatch):
    right = GroupedPositionalEncoding.rewrite
    wrong = lambda self, x: None if (out := right(self, x)) is None else 1.01 * out  # noqa: E731
    monkeypatch.setattr(GroupedPositionalEncoding, 'rewrite', wrong)
    monkeypatch.setattr(torch, 'compile', lambda model, **_: model)  # takes long
    with pytest.raises(UsageError, match='checks missed'):
        rows_of(tmp_path, 'checks')
    rows = json.loads((tmp_path / 'checks.json').read_text())['rows']
    missed = {row['form'] for row in rows if row['verdict'] == 'missed'}
    assert missed == {'grouped'}


@pytest.mark.slow
def test_forms(tmp_path):
    rows = rows_of(tmp_path, 'forms')
    assert [(row['model'], row['form'], row['dtype']) for row in rows] == [
        *[('linglo_b0', form, dtype) for dtype in ('fp32', 'bf16') for form in gpu_checks.FORMS],
        *[('pvt_v2_b0', 'plain', dtype) for dtype in ('fp32', 'bf16')],
    ]
    assert all(row['step_ms'] > 0 for row in rows)

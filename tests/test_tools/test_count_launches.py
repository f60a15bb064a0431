# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import json

import pytest
from conftest import import_tool, needs_counting

from mmlinglo.utils.cli import UsageError

pytestmark = needs_counting
tool = import_tool('tools/analysis_tools/count_launches.py')


def test_table(tmp_path, capsys):
    out = tmp_path / 'counts'
    args = '--models linglo_b0 pvt_v2_b0 --forms plain grouped --modes deploy --shape 64 96'
    tool.main([*args.split(), '--batch-size', '1', '--amp', 'bf16', '--out', str(out)])
    report = json.loads(out.with_suffix('.json').read_text())
    rows = report['rows']
    assert [(row['model'], row['form']) for row in rows] == [
        ('linglo_b0', 'plain'),
        ('linglo_b0', 'grouped'),
        ('pvt_v2_b0', 'plain'),
    ]
    assert all(row['forward_launches'] > 0 == row['backward_launches'] for row in rows)
    assert rows[0]['images'] == '1 x 64 x 96'
    assert 'nothing was timed' in report['provenance']['counted']
    assert '| pvt_v2_b0 | plain' in capsys.readouterr().out


def test_mistakes(tmp_path):
    with pytest.raises(UsageError, match='resnet19'):
        tool.main(['--models', 'resnet19', '--out', str(tmp_path / 'counts')])
    for args in (['--batch-size', '0'], ['--shape', '32', '32'], ['--compiled']):
        with pytest.raises(SystemExit):
            tool.main(args)

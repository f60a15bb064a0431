# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The day with a GPU: steps that end well, fail, hang or lack something, and its rehearsal."""

import json
import time

import pytest
from conftest import import_tool, run_tool

from mmlinglo.analysis.gpu_day import Step, plan, run_steps
from mmlinglo.utils.cli import UsageError

tool = import_tool('tools/analysis_tools/run_gpu_day.py')


@pytest.fixture
def root(tmp_path):
    """Commands: one prints a table and counts its calls, one fails, one hangs with a child."""
    (tmp_path / 'table.py').write_text(
        "import sys\nopen(sys.argv[1], 'a').write('x')\nprint('noise\\n| a |\\n|---|\\n| 7 |')"
    )
    (tmp_path / 'fail.py').write_text("raise SystemExit('error: no luck')")
    (tmp_path / 'hang.sh').write_text('echo begun\n(sleep 4; touch late) & sleep 60\n')
    return tmp_path


def run(root, steps, minutes=1.0, resume=False):
    outcomes = {step.name: found for step, found in run_steps(root, root, steps, minutes, resume)}
    assert {**json.loads((root / 'steps.json').read_text()), **outcomes} == json.loads(
        (root / 'steps.json').read_text()
    )
    return outcomes


def test_steps(root):
    calls = root / 'calls'
    steps = [
        Step('bad', 'A failing one', 1, [('fail.py',), ('table.py', str(calls))]),
        Step('alien', 'Without its package', 1, [('fail.py',)], ('no_such_package',)),
        Step('empty', 'Without its data', 1, [('fail.py',)], data=root / 'nowhere'),
        Step('slow', 'A hanging one', 0.05, [('table.py', str(calls)), ('hang.sh',)]),
        Step('good', 'A good one', 1, [('table.py', str(calls))]),
    ]
    found = run(root, steps)
    assert {name: outcome['status'] for name, outcome in found.items()} == dict(
        bad='failed', alien='skipped', empty='skipped', slow='stopped', good='done'
    )
    assert 'no_such_package' in found['alien']['reason']
    assert 'nowhere' in found['empty']['reason']
    assert calls.read_text() == 'xxx'
    summary = (root / 'summary.md').read_text()
    assert summary.count('| 7 |') == 3
    assert 'error: no luck' in summary
    assert 'begun' in summary
    assert 'noise' not in summary

    found = run(root, steps, resume=True)
    assert 'good' not in found
    assert calls.read_text() == 'xxx'  # finished commands of other steps are not run again
    time.sleep(4)
    assert not (root / 'late').exists()  # the hanging command's child was stopped with it


def test_no_time_is_left(root):
    found = run(root, [Step('good', 'A good one', 1, [('table.py', 'calls')])], minutes=0.001)
    assert found['good']['status'] == 'skipped'
    assert 'time' in found['good']['reason']


def test_commands_of_the_plan_exist(tmp_path):
    for rehearse in (False, True):
        steps = plan(tmp_path, rehearse)
        assert len({step.name for step in steps}) == len(steps) == 8
        scripts = {command[0] for step in steps for command in step.commands}
        assert all((tool.ROOT / script).is_file() for script in scripts - {'-m'})


def test_mistakes(tmp_path, monkeypatch):
    monkeypatch.setattr(tool.torch.cuda, 'is_available', lambda: False)
    for args, message in (
        ([], 'no GPU'),
        (['--rehearse', '--minutes', '0'], '--minutes'),
        (['--rehearse', '--steps', 'lunch'], 'lunch'),
    ):
        with pytest.raises(UsageError, match=message):
            tool.main([*args, '--out', str(tmp_path / 'out')])
    (tmp_path / 'steps.json').write_text('{}')
    with pytest.raises(UsageError, match='--resume'):
        tool.main(['--rehearse', '--out', str(tmp_path)])


@pytest.mark.slow
def test_rehearsal(tmp_path):
    out = tmp_path / 'day'
    run_tool('tools/gpu_day.sh', '--rehearse', '--out', out)
    steps = json.loads((out / 'steps.json').read_text())
    assert {name: step['status'] for name, step in steps.items()} == dict.fromkeys(steps, 'done')
    assert len(steps) == 8
    report = json.loads((out / 'checks.json').read_text())
    assert len(report['rows']) > 80
    assert all(row['verdict'] == 'met' for row in report['rows'])
    assert report['provenance']['rehearsal'] is True
    summary = (out / 'summary.md').read_text()
    for text in ('| RetinaNet', '| SemanticFPN', 'LinGlo-b0', '| pvt_v2_b0'):
        assert text in summary

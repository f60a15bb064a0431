# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Logging back ends: what docs/train.md names is what mmengine has, and TensorBoard gets what was logged."""

import json
import re
import sys

import pytest
from conftest import ROOT
from mmengine.config import Config
from mmengine.registry import VISBACKENDS
from toy import build_runner

from mmlinglo.utils.cli import UsageError, check_log_backends, load_runner_config, runner_parser

PAGE = (ROOT / 'docs/train.md').read_text()


def test_the_page_names_all_back_ends():
    named = re.findall(r'^\| `(\w+VisBackend)` \|', PAGE, re.MULTILINE)
    there = [name for name in VISBACKENDS.module_dict if name.endswith('VisBackend')]
    assert sorted(named) == sorted(set(there) - {'BaseVisBackend'})


@pytest.mark.parametrize('package', ['aim', 'clearml', 'dvclive', 'mlflow', 'neptune'])
def test_a_missing_package_is_named_with_the_line_of_the_page(package):
    (name,) = re.findall(rf'`(\w+)` \| `pip install {package}`', PAGE)
    cfg = Config(
        dict(visualizer=dict(vis_backends=[dict(type='LocalVisBackend'), dict(type=name)]))
    )
    with pytest.raises(UsageError, match=f'{name} needs another package: pip install {package}'):
        check_log_backends(cfg)


def test_missing_tensorboard_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorboard', None)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: sys.modules.get(name))
    cfg = Config(dict(visualizer=dict(vis_backends=[dict(type='TensorboardVisBackend')])))
    with pytest.raises(UsageError, match='pip install tensorboard'):
        check_log_backends(cfg)


@pytest.mark.parametrize('kind', ['LoggerHook', 'mmengine.LoggerHook'])
def test_one_process_writes_the_logs(kind, tmp_path):
    path = tmp_path / 'config.py'
    logger = f"default_hooks = dict(logger=dict(type='{kind}', interval=7))"
    path.write_text(f"model = dict()\ndefault_scope = 'mmdet'\n{logger}\n")
    cfg = load_runner_config(runner_parser('').parse_args([str(path)]))
    assert cfg.default_hooks.logger == dict(type='mmlinglo.MainProcessLoggerHook', interval=7)


def test_tensorboard_gets_the_losses(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    backends = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
    runner = build_runner(
        tmp_path,
        logger=dict(type='mmlinglo.MainProcessLoggerHook', interval=1),
        visualizer=dict(type='Visualizer', vis_backends=backends, name=tmp_path.name),
    )
    runner.train()
    runner.visualizer.close()
    (scalars,) = tmp_path.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in scalars.read_text().splitlines()]
    expected = {line['step']: line['loss'] for line in lines if 'loss' in line}
    events = EventAccumulator(str(scalars.parent))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars('loss')}
    assert found == pytest.approx(expected)
    assert len(found) == 12

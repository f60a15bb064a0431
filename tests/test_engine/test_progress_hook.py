# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""What a training says at its ends, and the bar of its validations."""

import io
import sys

import pytest
from toy import SIZE, Toy, build_runner

from mmlinglo.engine import ProgressHook


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize('terminal', [True, False])
def test_summary_and_bar(terminal, tmp_path, monkeypatch):
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, 'stderr', screen)
    runner = build_runner(tmp_path)
    runner.register_hook(ProgressHook())
    lines = []
    monkeypatch.setattr(runner.logger, 'info', lines.append)
    runner.train()
    log = '\n'.join(lines)
    parameters = sum(p.numel() for p in Toy().parameters()) / 1e6
    assert f'Toy, {parameters:.1f} M parameters, on the CPU in 1 process: ' in log
    assert f'{SIZE} images for training, ' in log
    assert f'checkpoints in {runner.work_dir}, log in ' in log
    assert ('validation' in screen.getvalue()) == terminal

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The command `mmlinglo`, in a folder that is no checkout."""

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch
from conftest import ROOT

import mmlinglo.__main__ as command
from mmlinglo.hub import find_root


def run(folder, *args):
    return subprocess.run(
        [sys.executable, '-m', 'mmlinglo', *map(str, args)],
        cwd=folder,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_tools_are_there_and_described():
    for name, (script, _) in command.TOOLS.items():
        assert (find_root() / 'tools' / script).is_file(), name
        assert f'\n  {name} ' in command.usage()
    for name in command.OTHERS:
        assert f'\n  {name} ' in command.usage()


def test_installed_under_its_name():
    (script,) = entry_points(group='console_scripts', name='mmlinglo')
    assert script.load() is command.main


def test_tool_runs_with_its_arguments(tmp_path):
    torch.save(dict(state_dict=dict(a=torch.ones(2)), optimizer={}), tmp_path / 'full.pth')
    result = run(tmp_path, 'publish', 'full.pth', 'small.pth')
    assert result.returncode == 0, result.stderr
    (published,) = tmp_path.glob('small*.pth')
    assert torch.equal(torch.load(published)['state_dict']['a'], torch.ones(2))


def test_mistakes_and_help_of_a_tool(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [])
    with pytest.raises(SystemExit, match=r"error: checkpoint 'missing\.pth' not found"):
        command.main(['publish', 'missing.pth', 'small.pth'])
    for name in ('train', 'check-env'):
        with pytest.raises(SystemExit) as end:
            command.main([name, '--help'])
        assert end.value.code == 0
        assert capsys.readouterr().out.startswith(f'usage: mmlinglo {name} ')


def test_list(capsys):
    assert command.main(['list', 'retinanet_linglo-b1_fpn*']) == 0
    assert 'retinanet_linglo-b1_fpn_1x_coco' in capsys.readouterr().out.split()


def test_list_for_a_reader_that_has_enough():
    line = f'{sys.executable} -m mmlinglo list | true'
    result = subprocess.run(line, cwd=ROOT, shell=True, stderr=subprocess.PIPE, text=True)
    assert result.stderr == ''


def test_misspelt_command(capsys):
    assert command.main(['trian']) == 2
    assert "no command 'trian', did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize('args', [[], ['--help'], ['-h']])
def test_help(args, capsys):
    assert command.main(args) == 0
    assert capsys.readouterr().out == command.usage() + '\n'


def test_version(capsys):
    assert command.main(['--version']) == 0
    assert capsys.readouterr().out.strip() == command.mmlinglo.__version__

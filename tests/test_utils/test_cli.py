# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Mistakes in arguments and configs, in this process; test_bad_input.py has the command lines."""

import argparse
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, MODELS

from mmlinglo.engine import TrainingError
from mmlinglo.utils import CheckpointError, cli
from mmlinglo.utils.cli import UsageError, load_config, run, runner_parser
from mmlinglo.utils.files import complete_file

CONFIG = str(ROOT / 'configs/quickstart/linglo-b0_2xb16-8e_shapes.py')


def message_of(error):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run(main)
    return ended.value.code


@pytest.mark.parametrize('kind', [UsageError, CheckpointError, FileNotFoundError])
def test_mistakes_end_with_their_message(kind):
    assert message_of(kind('what is wrong')) == 'error: what is wrong'


def test_errors_of_data_workers_lose_their_traceback():
    text = 'Caught TrainingError in DataLoader worker process 0.\nTraceback ...\n'
    error = TrainingError(f'{text}mmlinglo.engine.errors.TrainingError: a.jpg cannot be read')
    assert message_of(error) == 'error: a.jpg cannot be read'


def test_an_unknown_type_is_a_mistake():
    with pytest.raises(SystemExit, match=r'^error: .*NoSuchModel is not in the .*registry'):
        run(lambda: MODELS.build(dict(type='NoSuchModel')))


def test_a_data_set_that_does_not_fit_its_files(tmp_path):
    (tmp_path / 'cat').mkdir()
    (tmp_path / 'cat' / 'a.png').touch()
    dataset = dict(type='CustomDataset', data_root=str(tmp_path), metainfo=dict(classes=('a', 'b')))
    with pytest.raises(SystemExit, match=r'^error: .* cannot be loaded \(.*of subfolders \(1\)'):
        run(lambda: DATASETS.build(dict(dataset, _scope_='mmpretrain')))


@pytest.mark.parametrize(
    ('text', 'reason'), [('', 'JSONDecodeError'), ('[]', 'AssertionError'), ('{}', 'KeyError')]
)
def test_a_broken_annotation_file(text, reason, tmp_path):
    path = tmp_path / 'train.json'
    path.write_text(text)
    dataset = dict(type='CocoDataset', ann_file=str(path), _scope_='mmdet')
    with pytest.raises(SystemExit, match=f"^error: '{path}' cannot be loaded .{reason}: "):
        run(lambda: DATASETS.build(dataset))


def test_errors_in_a_data_set_of_ones_own_keep_their_traceback():
    class Mine(BaseDataset):
        def load_data_list(self):
            return 1 // 0

    with pytest.raises(ZeroDivisionError):
        run(Mine)


def test_files_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').touch()
    for path in (tmp_path / 'file/below', tmp_path):
        with pytest.raises(SystemExit, match=f"^error: '{path}': "):
            run(lambda path=path: complete_file(path).__enter__())


def test_an_interruption_has_no_traceback(capsys):
    with pytest.raises(SystemExit) as ended:
        run(lambda: signal.raise_signal(signal.SIGINT))
    assert ended.value.code == 130
    assert capsys.readouterr().err == 'interrupted\n'


def test_output_that_nobody_reads_to_its_end():
    code = 'from mmlinglo.utils.cli import run\nrun(lambda: print("line\\n" * 10**5))'
    command = f'{shlex.quote(sys.executable)} -W ignore -c {shlex.quote(code)} | head -1'
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert result.stdout == 'line\n'
    assert 'BrokenPipe' not in result.stderr


@pytest.mark.parametrize(
    'error',
    [
        AssertionError('a fault'),
        KeyError('a key'),
        KeyError('x is not in the registry'),
        RuntimeError('a fault'),
    ],
)
def test_other_errors_keep_their_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        run(main)


def test_a_tool_that_succeeds():
    done = []
    run(lambda: done.append(1))
    run(lambda: 0)
    assert done == [1]


def test_a_tool_that_returns_its_exit_status():
    with pytest.raises(SystemExit) as ended:
        run(lambda: 3)
    assert ended.value.code == 3


def test_an_error_in_a_config_is_shown_with_its_line(tmp_path, capsys):
    (tmp_path / 'base.py').write_text('def count():\n    return 1 / 0\n\nx = count()\n')
    config = tmp_path / 'config.py'
    config.write_text("_base_ = './base.py'\n")
    with pytest.raises(SystemExit, match=r'^error: config .*: ZeroDivisionError: division by zero'):
        run(lambda: load_config(str(config)))
    shown = capsys.readouterr().err
    assert f'"{tmp_path / "base.py"}", line 4' in shown
    assert 'return 1 / 0' in shown
    assert 'mmengine' not in shown


def test_a_failing_custom_import_is_shown_with_its_cause(tmp_path, capsys, monkeypatch):
    (tmp_path / 'my_broken_project.py').write_text('import absent_package\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    config = tmp_path / 'config.py'
    config.write_text("custom_imports = dict(imports=['my_broken_project'])\n")
    with pytest.raises(SystemExit, match=r'^error: config .*: ImportError'):
        run(lambda: load_config(str(config)))
    shown = capsys.readouterr().err
    assert 'my_broken_project.py", line 1' in shown
    assert "No module named 'absent_package'" in shown


@pytest.mark.parametrize(
    'name', ['retinanet_linglo-b0_fpn_1x_coco', 'linglo-b0-cpe_8xb128-100e_in1k']
)
def test_recipes_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(load_config(name).filename).stem == name
    (tmp_path / name).write_text("model = dict()\ndefault_scope = 'mmdet'\n")
    with pytest.raises(UsageError, match='Only py/yml/yaml/json type are supported'):
        load_config(name)  # an existing file wins


@pytest.mark.parametrize(
    ('name', 'similar'),
    [
        ('retinanet_linglo-b0_fpn_1x_cocoo', "Did you mean 'retinanet_linglo-b0_fpn_1x_coco'"),
        ('retinanet_linglo-b0', "Did you mean 'retinanet_linglo-b0_fpn_"),
        ('configs/coco/retinanet_linglo-b0_fpn_1x_coc.py', "'retinanet_linglo-b0_fpn_1x_coco'"),
        ('no/retinanet_linglo-b0_fpn_1x_coco.py', "give 'retinanet_linglo-b0_fpn_1x_coco'"),
        ('xyz', r"no recipe is named 'xyz'\. mmlinglo\.list_models"),
    ],
)
def test_misspelt_recipes(name, similar):
    with pytest.raises(UsageError, match=rf"^config '{name}' not found.*{similar}"):
        load_config(name)


def test_recipe_names_are_unique():
    names = [path.stem for path in ROOT.glob('configs/[!_]*/*.py')]
    assert len(names) == len(set(names)) > 60


def test_config_with_settings():
    assert load_config(CONFIG, {'train_cfg.max_epochs': 3}).train_cfg.max_epochs == 3


@pytest.mark.parametrize(
    ('content', 'options', 'message'),
    [
        (None, None, r"config '.*config\.py' not found"),
        ('x = (', None, r"config '.*config\.py': SyntaxError"),
        ('x = 1', None, 'lacks model and default_scope: give the config of an experiment'),
        ("model = dict()\ndefault_scope = 'mmdet'", {'model.x.y.z': 1}, None),
        ('model = [1]', {'model.k': 1}, '--cfg-options do not fit'),
    ],
)
def test_configs(content, options, message, tmp_path):
    path = tmp_path / 'config.py'
    if content is not None:
        path.write_text(content)
    if message is None:
        assert load_config(str(path), options).model.x.y.z == 1
        return
    with pytest.raises(UsageError, match=message):
        load_config(str(path), options)


def test_device(monkeypatch):
    monkeypatch.setattr(cli, 'get_device', lambda: 'cpu')
    assert cli.checked_device(None) == cli.checked_device('cpu') == 'cpu'
    with pytest.raises(UsageError, match="--device 'abacus' cannot be used here: "):
        cli.checked_device('abacus')


@pytest.fixture
def load_runner_config(monkeypatch, tmp_path):
    """Of command lines of train.py, with what it changes in this process undone."""
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.setattr(cli, 'use_in_mmengine', lambda trust: trusted.append(trust))
    monkeypatch.setattr(cli, 'prepare_cpu_distributed', lambda cfg: prepared.append(cfg))
    monkeypatch.chdir(tmp_path)
    trusted, prepared = [], []

    def call(*args) -> argparse.Namespace:
        cfg = cli.load_runner_config(runner_parser('').parse_args([CONFIG, *args]))
        return argparse.Namespace(cfg=cfg, trusted=trusted, prepared=prepared)

    return call


def test_work_dir(load_runner_config):
    assert load_runner_config().cfg.work_dir == 'work_dirs/linglo-b0_2xb16-8e_shapes'
    assert load_runner_config('--cfg-options', 'work_dir=theirs').cfg.work_dir == 'theirs'
    given = load_runner_config('--work-dir', 'given', '--cfg-options', 'work_dir=theirs')
    assert given.cfg.work_dir == 'given'


@pytest.mark.parametrize('options', [['x', '=', '2'], ['=2'], ['x']])
def test_settings_without_a_key_or_a_value(options, capsys):
    with pytest.raises(SystemExit):
        runner_parser('').parse_args([CONFIG, '--cfg-options', *options])
    assert f'must be key=value, without spaces, got {options[0]!r}' in capsys.readouterr().err


def test_torchrun_is_missing(load_runner_config, monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    with pytest.raises(UsageError, match=r'torchrun has started: use tools/dist_train\.sh'):
        load_runner_config('--launcher', 'pytorch')


@pytest.mark.skipif(torch.cuda.is_available(), reason='of machines without GPUs')
def test_launchers_without_gpus(load_runner_config, monkeypatch):
    monkeypatch.setenv('RANK', '0')
    found = load_runner_config('--launcher', 'pytorch')
    assert found.prepared == [found.cfg]
    assert found.cfg.launcher == 'pytorch'
    assert load_runner_config().prepared == [found.cfg]  # none without a launcher
    with pytest.raises(UsageError, match='--launcher slurm needs GPUs'):
        load_runner_config('--launcher', 'slurm')


def test_more_processes_than_gpus(load_runner_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    monkeypatch.setenv('RANK', '0')
    with pytest.raises(UsageError, match='2 processes on a machine with 1 GPUs'):
        load_runner_config('--launcher', 'pytorch')


@pytest.mark.parametrize('trust', [False, True])
def test_trust(load_runner_config, trust):
    assert load_runner_config(*['--trust-checkpoint'] * trust).trusted == [trust]


# Missing data


@pytest.mark.parametrize(
    ('name', 'missing', 'page'),
    [
        ('retinanet_linglo-b0_fpn_1x_coco', 'instances_train2017.json', 'configs/coco/README.md'),
        ('fpn_linglo-b0_8xb4-40k_ade20k-512x512', 'images/training', 'configs/ade20k/README.md'),
        ('linglo-b0_8xb128_in1k', 'data/imagenet/train', 'configs/imagenet/README.md'),
    ],
)
def test_missing_data_are_named_first(name, missing, page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        cli.check_data_files(load_config(name), name, 'train', 'val')
    first, second = str(caught.value).splitlines()
    assert missing in first
    assert first.endswith('which train_dataloader reads, not found')
    assert page in second
    assert f'tools/misc/check_dataset.py {name}' in second
    assert (ROOT / page).is_file()


def test_data_that_are_there_or_elsewhere(tmp_path):
    (tmp_path / 'train').mkdir()
    there = dict(type='CustomDataset', data_root=str(tmp_path), data_prefix='train')
    wrapped = dict(type='RepeatDataset', times=2, dataset=there)
    remote = dict(there, data_prefix='val', backend_args=dict(backend='petrel'))
    downloaded = dict(type='CIFAR10', data_prefix=str(tmp_path / 'cifar10'))
    for dataset in (there, wrapped, remote, downloaded, dict(there, ann_file='s3://bucket/a.json')):
        cfg = Config(dict(train_dataloader=dict(dataset=dataset), val_dataloader=None))
        cli.check_data_files(cfg, 'mine.py', 'train', 'val')
    joined = dict(type='ConcatDataset', datasets=[there, dict(there, ann_file='a.json')])
    for dataset in (dict(wrapped, dataset=dict(there, ann_file='a.json')), joined):
        cfg.train_dataloader.dataset = dataset
        with pytest.raises(UsageError, match=r'a\.json.* not found\ndocs/custom_dataset\.md'):
            cli.check_data_files(cfg, 'mine.py', 'train')

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Real trainings on a very small synthetic data set, through the command lines."""

import json
import os
import pickle
import re
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import run_tool
from trainings import LAST, TASKS, write_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope='session', params=TASKS)
def trained(request, shapes, tmp_path_factory):
    """Task, config, work dir and checkpoint of a training in two gloo processes."""
    folder = tmp_path_factory.mktemp(request.param)
    config = write_config(folder / 'config.py', shapes, request.param)
    run_tool('tools/dist_train.sh', config, 2, '--work-dir', folder / 'work')
    return request.param, config, folder / 'work', folder / f'work/{LAST[request.param]}.pth'


def test_two_processes_train(trained):
    task, _, work_dir, checkpoint = trained
    log = next(work_dir.glob('*/vis_data/scalars.json')).read_text().splitlines()
    losses = [json.loads(line)['loss'] for line in log if '"loss"' in line]
    assert losses
    metric = dict(detection='coco/bbox_mAP_50', segmentation='mIoU', classification='accuracy/top1')
    assert any(metric[task] in json.loads(line) for line in log)
    state = torch.load(checkpoint, weights_only=False)
    assert all(v.isfinite().all() for v in state['state_dict'].values())
    assert state['meta']['iter'] == 4


def test_testing_gives_the_validation_metric_in_one_process_and_in_two(trained, tmp_path):
    _, config, work_dir, checkpoint = trained
    log = next(work_dir.glob('*/vis_data/scalars.json')).read_text().splitlines()
    validated = json.loads(log[-1])
    run_tool('tools/test.py', config, checkpoint, '--work-dir', tmp_path / 'one')
    run_tool('tools/dist_test.sh', config, checkpoint, 2, '--work-dir', tmp_path / 'two')
    for name in ('one', 'two'):
        metrics = json.loads(next((tmp_path / name).glob('*/*.json')).read_text())
        for key, value in metrics.items():
            if 'time' not in key:
                assert value == pytest.approx(validated[key], abs=1e-4), key


def test_predictions_and_pictures(trained, tmp_path):
    task, config, _, checkpoint = trained
    out = tmp_path / ('labels' if task == 'segmentation' else 'predictions.pkl')
    show_dir = tmp_path / 'show'
    args = ['--work-dir', tmp_path / 'work', '--out', out, '--show-dir', show_dir]
    run_tool('tools/test.py', config, checkpoint, *args)
    if task == 'segmentation':
        assert len(list(out.glob('*.png'))) == 8
    else:
        assert len(pickle.loads(out.read_bytes())) == 8
    pictures = [p for p in show_dir.rglob('*') if p.suffix in ('.jpg', '.png')]
    assert pictures


def test_inference_and_deployment(trained, shapes, tmp_path):
    """Pictures and predictions of the training form, and the same predictions of both deployed ways."""
    task, config, _, checkpoint = trained
    deployed = tmp_path / 'deployed.pth'
    convert = run_tool(
        'tools/model_converters/reparameterize_model.py', config, checkpoint, deployed
    )
    difference = float(re.search(r'differ by (\S+)', convert.stdout).group(1))
    assert 0 < difference < 1e-5
    state = torch.load(deployed, weights_only=True)
    assert state['meta']['reparameterized']['relative_difference'] == pytest.approx(
        difference, rel=0.1
    )
    assert 'deploy=True' in state['meta']['cfg']
    assert state['meta']['dataset_meta']['classes']
    assert not any('branches' in key for key in state['state_dict'])

    demo = shapes / 'demo'
    runs = {
        'plain': [config, checkpoint, demo],
        'flag': [config, checkpoint, demo, '--deploy'],
        'file': [config, deployed, demo, '--cfg-options', 'model.backbone.deploy=True'],
    }
    predictions = {}
    for name, args in runs.items():
        out = tmp_path / name
        run_tool('tools/infer.py', *args[:3], '--out-dir', out, *args[3:])
        assert len(list((out / 'vis').iterdir())) == 2
        suffix = 'png' if task == 'segmentation' else 'json'
        predictions[name] = sorted((out / 'preds').glob(f'*.{suffix}'))
        assert len(predictions[name]) == 2
    for name in ('flag', 'file'):
        for first, second in zip(predictions['plain'], predictions[name]):
            if first.suffix == '.json':
                a, b = json.loads(first.read_text()), json.loads(second.read_text())
                assert a.keys() == b.keys()
                key = 'scores' if task == 'detection' else 'pred_scores'
                assert a[key] == pytest.approx(b[key], abs=1e-4)
            else:
                assert first.read_bytes() == second.read_bytes()


def test_resume_continues(shapes, tmp_path):
    """Interrupted after one epoch of two and resumed: the same schedule, counters and data set."""
    config = write_config(tmp_path / 'config.py', shapes, 'classification')
    work = tmp_path / 'work'
    run_tool(
        'tools/train.py', config, '--work-dir', work, '--cfg-options', 'train_cfg.max_epochs=1'
    )
    run_tool('tools/train.py', config, '--work-dir', work, '--resume')
    state = torch.load(work / 'epoch_2.pth', weights_only=False)
    assert state['meta']['epoch'] == 2
    _, second = sorted(work.glob('*/vis_data/scalars.json'))
    epochs = [json.loads(line).get('epoch') for line in second.read_text().splitlines()]
    assert 1 not in epochs[:-1]
    explicit = tmp_path / 'explicit'
    run_tool('tools/train.py', config, '--work-dir', explicit, '--resume', work / 'epoch_1.pth')
    other = torch.load(explicit / 'epoch_2.pth', weights_only=False)
    rates = [s['optimizer']['param_groups'][0]['lr'] for s in (state, other)]
    assert rates[0] == rates[1]
    assert other['meta']['iter'] == state['meta']['iter']


def test_auto_scale_lr(shapes, tmp_path):
    config = write_config(tmp_path / 'config.py', shapes, 'classification')
    run_tool('tools/train.py', config, '--work-dir', tmp_path / 'work', '--auto-scale-lr')
    state = torch.load(tmp_path / 'work/epoch_2.pth', weights_only=False)
    # one process with a batch of 4 where the recipe has 32
    initial = {group['initial_lr'] for group in state['optimizer']['param_groups']}
    assert initial == {1e-3 * 4 / 32}


def test_synchronised_ranks(shapes, tmp_path):
    """After training, both ranks hold the same weights and batch-norm statistics."""
    plugin = tmp_path / 'dump_rank.py'
    plugin.write_text(
        'import torch\n'
        'from mmengine.dist import get_rank\n'
        'from mmengine.hooks import Hook\n'
        'from mmengine.registry import HOOKS\n'
        '@HOOKS.register_module()\n'
        'class DumpRank(Hook):\n'
        '    priority = "LOWEST"\n'
        '    def after_train(self, runner):\n'
        f'        torch.save(runner.model.module.state_dict(), f"{tmp_path}/rank{{get_rank()}}.pth")\n'
    )
    extra = "custom_imports = dict(imports=['dump_rank'])\ncustom_hooks = [dict(type='DumpRank')]\n"
    config = write_config(tmp_path / 'config.py', shapes, 'segmentation', extra)
    run_tool(
        'tools/dist_train.sh', config, 2, '--work-dir', tmp_path / 'work',
        '--cfg-options', 'train_cfg.max_iters=3', 'train_cfg.val_interval=100',
        PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    first, second = (torch.load(tmp_path / f'rank{i}.pth') for i in range(2))
    assert any('running_var' in key for key in first)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_two_nodes(shapes, tmp_path):
    """NNODES, NODE_RANK, MASTER_ADDR and PORT: two nodes of one process each, on this machine."""
    config = write_config(tmp_path / 'config.py', shapes, 'classification')
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = str(probe.getsockname()[1])
    nodes = dict(NNODES='2', MASTER_ADDR='127.0.0.1', PORT=port)
    with ThreadPoolExecutor() as pool:
        args = ('tools/dist_train.sh', config, 1, '--work-dir', tmp_path / 'work')
        runs = [pool.submit(run_tool, *args, NODE_RANK=str(rank), **nodes) for rank in range(2)]
        for run in runs:
            run.result()
    state = torch.load(tmp_path / 'work/epoch_2.pth', weights_only=False)
    assert state['meta']['iter'] == 4  # 16 scenes in batches of 4 on two nodes, two epochs


@pytest.mark.parametrize('script', ['slurm_train.sh', 'slurm_test.sh'])
def test_slurm_command(script, tmp_path):
    """What the scripts ask of srun, seen by a stand-in for it."""
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    environment = dict(
        PATH=f'{tmp_path}:{os.environ["PATH"]}', GPUS='16', SRUN_ARGS='--exclude=a --qos=b'
    )
    result = run_tool(f'tools/{script}', 'part', 'job', 'c.py', 'last', '--amp', **environment)
    words = result.stdout.splitlines()
    assert words[:2] == ['-p', 'part']
    expected = {'--job-name=job', '--ntasks=16', '--ntasks-per-node=8', '--gres=gpu:8'}
    assert expected | {'--exclude=a', '--qos=b'} <= set(words)
    tail = ['--work-dir', 'last'] if script == 'slurm_train.sh' else ['last']
    assert words[-len(tail) - 4 :] == ['c.py', *tail, '--amp', '--launcher', 'slurm']

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""A campaign that is interrupted, goes on, meets a training that fails, and skips what is finished."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, import_tool, run_tool

from mmlinglo.utils.cli import UsageError

TOOL = 'tools/analysis_tools/run_ablations.py'
EPOCHS = 4


def arguments(cifar10, work_dir, out, epochs=EPOCHS):
    return [
        *('--rows', 'linglo-b0-cpe', 'resnet18', '--seeds', 0, '--epochs', epochs),
        *('--data-root', cifar10, '--data-format', 'folder', '--work-dir', work_dir, '--out', out),
        *('--cfg-options', 'train_dataloader.batch_size=4', 'train_dataloader.num_workers=1'),
        *('val_dataloader.num_workers=1', 'train_dataloader.dataset.pipeline.3.scale=32'),
        'val_dataloader.dataset.pipeline.1.scale=32',
    ]


def validated(work_dir):
    """Epochs that were validated, for each part of a training."""
    parts = []
    for log in sorted(work_dir.glob('*/vis_data/scalars.json')):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        parts.append([line['step'] for line in lines if 'accuracy/top1' in line])
    return parts


def interrupt_after_first_epoch(command, work_dir):
    """Start a campaign and end it when the training in ``work_dir`` has validated an epoch."""
    environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': ''}
    campaign = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, stderr=subprocess.PIPE
    )
    deadline = time.time() + 300
    while not any(validated(work_dir)):
        assert campaign.poll() is None, campaign.stderr.read().decode()
        assert time.time() < deadline
        time.sleep(0.02)
    campaign.send_signal(signal.SIGTERM)
    assert campaign.wait(30) == 1
    assert campaign.stderr.read().decode().endswith('error: terminated\n')


def state(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob('*')}


@pytest.mark.slow
def test_campaign(cifar10, tmp_path):
    work_dir, out = tmp_path / 'work', tmp_path / 'results/campaign'
    first, second = work_dir / 'linglo-b0-cpe/seed0', work_dir / 'resnet18/seed0'
    command = [TOOL, *arguments(cifar10, work_dir, out)]

    interrupt_after_first_epoch(command, first)
    (before,) = validated(first)
    assert before[0] == 1
    assert before[-1] < EPOCHS
    assert not second.exists()
    time.sleep(1)
    assert validated(first) == [before]  # the training ended with the campaign

    # The first repeats its last validation and goes on; the second cannot write its checkpoint.
    (second / 'epoch_1.pth').mkdir(parents=True)
    result = run_tool(*command, check=False)
    assert result.returncode == 1
    assert result.stderr.endswith(f'error: 1 trainings failed: {second}\n')
    assert f'[2/2] {second}: failed, see {second}/train.log' in result.stdout
    assert validated(first) == [before, list(range(before[-1], EPOCHS + 1))]
    assert [path.name for path in first.glob('*.pth')] == [f'epoch_{EPOCHS}.pth']
    rows = json.loads((tmp_path / 'results/campaign.json').read_text())['rows']
    assert [(row['row'], row['seeds']) for row in rows] == [('linglo-b0-cpe', 1), ('resnet18', 0)]
    assert (tmp_path / 'results/campaign.png').is_file()

    # Only the second is left.
    (second / 'epoch_1.pth').rmdir()
    finished = state(first)
    result = run_tool(*command)
    assert re.search(rf'{first}: top-1 [\d.]+ % \(finished before\)', result.stdout)
    assert re.search(rf'{second}: top-1 [\d.]+ % \(\d+ s\)', result.stdout)
    assert state(first) == finished
    assert validated(second)[-1] == list(range(1, EPOCHS + 1))
    with open(tmp_path / 'results/campaign.csv') as file:
        table = {row['row']: row for row in csv.DictReader(file)}
    log = sorted(second.glob('*/vis_data/scalars.json'))[-1].read_text().splitlines()
    assert float(table['resnet18']['top1_mean']) == json.loads(log[-1])['accuracy/top1']

    # Nothing is left, and nothing is mixed with other settings.
    finished = state(second)
    result = run_tool(*command)
    assert result.stdout.count('(finished before)') == 2
    other = run_tool(TOOL, *arguments(cifar10, work_dir, out, epochs=3), check=False)
    assert other.returncode == 1
    assert 'made with other settings' in other.stderr
    assert re.search(r'^-.*max_epochs=4', other.stderr, re.M)
    assert state(second) == finished


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--data-root', '/nowhere'], 'the data cannot be read (FileNotFoundError: [Errno 2]'),
        (['--fraction', 2], 'must be in (0, 1], got 2.0'),
        (['--epochs', 1], 'epochs must be at least 2'),
        (['--cfg-options', 'train_dataloader.batch_size.x=1'], '--cfg-options do not fit'),
        ([], '20 training images are less than two batches of 128'),
    ],
)
def test_mistakes(cifar10, tmp_path, monkeypatch, more, message):
    tool = import_tool(TOOL)
    work_dir = tmp_path / 'work'
    command = ['--rows', 'resnet18', '--data-format', 'folder', '--data-root', cifar10]
    monkeypatch.setattr(signal, 'signal', lambda *_: None)
    with pytest.raises(UsageError, match=re.escape(message)):
        tool.main([str(word) for word in (*command, '--work-dir', work_dir, *more)])
    assert not work_dir.exists()

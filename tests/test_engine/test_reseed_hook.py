# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Resumed against uninterrupted trainings of a toy that draws from every random generator."""

import copy
import random

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from toy import SIZE, Recorder, build_runner

from mmlinglo.engine import ReseedHook


def train(work_dir, *, reseed=True, resume=None, **kwargs):
    """Final weights and a recorder."""
    recorder = Recorder()
    runner = build_runner(
        work_dir,
        hooks=[recorder, *([ReseedHook()] if reseed else [])],
        load_from=resume,
        resume=resume is not None,
        **kwargs,
    )
    runner.train()
    return copy.deepcopy(runner.model.state_dict()), recorder


def same(first, second):
    return all(torch.equal(value, second[key]) for key, value in first.items())


def resume_from_each(tmp_path, *, by_epoch, **kwargs):
    """Whether weights, losses and data of runs resumed from each checkpoint are those of one run."""
    weights, whole = train(tmp_path, by_epoch=by_epoch, **kwargs)
    assert len(whole.losses) == 12
    steps = (1, 2, 3) if by_epoch else (3, 6, 9)
    equal = []
    for step in steps:
        checkpoint = tmp_path / f'{"epoch" if by_epoch else "iter"}_{step}.pth'
        # another process would start with other random states
        random.seed(step)
        np.random.seed(step)
        torch.manual_seed(step)
        other = tmp_path / f'from_{step}'
        resumed, recorder = train(other, by_epoch=by_epoch, resume=str(checkpoint), **kwargs)
        first = step * 3 if by_epoch else step
        assert sorted(recorder.losses) == list(range(first, 12))
        equal.append(
            same(weights, resumed)
            and all(whole.losses[i] == loss for i, loss in recorder.losses.items())
            and all(torch.equal(whole.data[i], data) for i, data in recorder.data.items())
        )
    return equal


@pytest.mark.parametrize(
    ('workers', 'persistent', 'seed'),
    [
        (0, False, 3),
        pytest.param(0, False, None, marks=pytest.mark.slow),
        pytest.param(2, False, 3, marks=pytest.mark.slow),
        (2, True, None),
    ],
    ids=['0-seed', '0-drawn', '2-seed', '2-persistent-drawn'],
)
@pytest.mark.parametrize('by_epoch', [True, False], ids=['epochs', 'iterations'])
def test_resumed_run_equals_an_uninterrupted_one(by_epoch, workers, persistent, seed, tmp_path):
    kwargs = dict(by_epoch=by_epoch, workers=workers, persistent=persistent, seed=seed)
    assert resume_from_each(tmp_path, **kwargs) == [True] * 3


@pytest.mark.parametrize('by_epoch', [True, False], ids=['epochs', 'iterations'])
def test_mmengine_alone_does_not_do_it(by_epoch, tmp_path):
    """Otherwise the comparisons above would show nothing about the hook."""
    assert resume_from_each(tmp_path, reseed=False, by_epoch=by_epoch) == [False] * 3


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_epochs_differ(workers, tmp_path):
    """No two epochs see the same random numbers, nor do two workers."""
    _, recorder = train(tmp_path, workers=workers, persistent=workers > 0)
    data = torch.cat([recorder.data[i] for i in range(12)])
    assert len(data) == 4 * SIZE
    for column in (1, 2, 3):
        assert len(set(data[:, column].tolist())) == 4 * SIZE
    for epoch in range(4):
        indices = data[epoch * SIZE : (epoch + 1) * SIZE, 0]
        assert sorted(indices.tolist()) == list(range(SIZE))
    assert not torch.equal(data[:SIZE, 0], data[SIZE : 2 * SIZE, 0])


def test_iterations_drop_and_repeat_nothing(tmp_path):
    """New workers at each checkpoint go on in the sampler's stream."""
    _, recorder = train(tmp_path, by_epoch=False, workers=2, persistent=True)
    indices = torch.cat([recorder.data[i][:, 0] for i in range(12)])
    for start in range(0, 40, SIZE):
        assert sorted(indices[start : start + SIZE].tolist()) == list(range(SIZE))


class Processes(Hook):
    """Process numbers of the data workers in each epoch."""

    def __init__(self):
        self.epochs = []

    def after_train_epoch(self, runner):
        self.epochs.append([worker.pid for worker in runner.train_dataloader._iterator._workers])


def test_data_workers_live_on(tmp_path):
    processes = Processes()
    hooks = [processes, ReseedHook()]
    build_runner(tmp_path, hooks=hooks, workers=2, persistent=True).train()
    assert len(processes.epochs) == 4
    assert len(set(map(tuple, processes.epochs))) == 1


def test_the_number_of_workers_does_not_matter(tmp_path):
    weights, first = train(tmp_path / 'none')
    resumed, second = train(tmp_path / 'two', workers=2, resume=str(tmp_path / 'none/epoch_2.pth'))
    assert same(weights, resumed)
    assert all(torch.equal(first.data[i], data) for i, data in second.data.items())


def test_loading_leaves_the_random_numbers_of_the_training_alone(tmp_path):
    """Without data workers both draw in one process."""
    losses = [train(tmp_path / str(n), workers=n)[1].losses for n in (0, 1)]
    assert losses[0] == losses[1]

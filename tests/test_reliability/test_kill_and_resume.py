# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Trainings that are killed and resumed end as if nothing had happened."""

import pytest
from faults import (
    assert_same_result,
    checkpoints,
    finish,
    last_epoch,
    resumed_epoch,
    start,
    write_config,
)

pytestmark = pytest.mark.slow
OPERATIONS = 8  # on files; four for a regular checkpoint, six more for a new best one


@pytest.fixture(scope='module')
def config(shapes, tmp_path_factory):
    return write_config(tmp_path_factory.mktemp('config') / 'config.py', shapes)


@pytest.fixture(scope='module')
def uninterrupted(config, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('uninterrupted') / 'work'
    finish(start(config, work_dir))
    return work_dir


def test_killed_at_each_operation_on_a_checkpoint_file(config, uninterrupted, tmp_path):
    work_dir = tmp_path / 'work'
    epoch = 0
    for operation in range(1, OPERATIONS + 1):
        process = start(config, work_dir, crash=operation)
        process.join(120)
        if process.exitcode == 0:
            break  # the training is at its end
        assert process.exitcode == -9, process.log.read_text()[-4000:]
        assert resumed_epoch(process) == epoch
        assert last_epoch(work_dir) >= epoch
        epoch = last_epoch(work_dir)
    assert epoch >= 3
    final = start(config, work_dir)
    finish(final)
    assert_same_result(work_dir, uninterrupted)


def test_mmengine_alone_loses_all(config, tmp_path):
    """Killed between the removal of the first checkpoint and the writing of the second."""
    hook = 'default_hooks.checkpoint.type=CheckpointHook'
    process = start(config, tmp_path / 'work', '--cfg-options', hook, crash=7)
    process.join(120)
    assert process.exitcode == -9, process.log.read_text()[-4000:]
    assert not [name for name in checkpoints(tmp_path / 'work') if name.startswith('epoch')]

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""What the other processes do when one of them is killed, hangs or fails."""

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from conftest import ROOT
from faults import (
    assert_same_result,
    children,
    finish,
    free_port,
    last_epoch,
    newest_epoch,
    start_ranks,
    wait_for,
    write_config,
)

pytestmark = pytest.mark.slow
BOUND = 60  # seconds


@pytest.fixture(scope='module')
def config(shapes, tmp_path_factory):
    return write_config(tmp_path_factory.mktemp('config') / 'config.py', shapes, epochs=8)


@contextmanager
def launched(config, work_dir, gpus, **env):
    """``tools/dist_train.sh``, killed with all it started if it does not end."""
    work_dir.mkdir(parents=True, exist_ok=True)
    log = work_dir.parent / f'{work_dir.name}_{env.get("NODE_RANK", 0)}.txt'
    env = {
        **os.environ, 'PYTHON': sys.executable, 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1', **env
    }  # fmt: skip
    script = ROOT / 'tools/dist_train.sh'
    command = ['bash', script, config, str(gpus), '--work-dir', work_dir, '--resume']
    with open(log, 'a') as output:
        process = subprocess.Popen(
            command,
            cwd=work_dir.parent,
            env=env,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    process.log = log
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def end_of(process):
    """Exit status of a launcher that ends within the bound; nothing it started may be left."""
    ranks = children(process.pid)
    wait_for(lambda: process.poll() is not None, BOUND, process.log.read_text()[-3000:])
    wait_for(lambda: not any(map(is_running, ranks)), BOUND, 'processes are left')
    return process.returncode


def is_running(pid):
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rpartition(') ')[2][0] != 'Z'
    except FileNotFoundError:
        return False


def is_training(work_dir, epoch=1):
    return lambda: newest_epoch(work_dir) >= epoch


def test_a_killed_rank_ends_the_job_and_a_stopped_job_resumes(config, tmp_path):
    """SIGKILL for one of two ranks, SIGTERM for the launcher; then the result of an undisturbed run."""
    work_dir = tmp_path / 'work'
    with launched(config, work_dir, 2) as job:
        wait_for(is_training(work_dir), 200, 'no checkpoint')
        os.kill(children(job.pid)[1], signal.SIGKILL)
        status = end_of(job)
        assert status != 0
        assert 'SIGKILL' in job.log.read_text() or 'Signal 9' in job.log.read_text()
    epoch = last_epoch(work_dir)
    with launched(config, work_dir, 2) as job:
        wait_for(is_training(work_dir, epoch + 1), 200, 'no further checkpoint')
        job.terminate()
        status = end_of(job)
        assert status != 0
    finish(*start_ranks(config, work_dir))
    finish(*start_ranks(config, tmp_path / 'reference'))
    assert_same_result(work_dir, tmp_path / 'reference')


def test_a_killed_launcher_ends_its_processes(config, tmp_path):
    """They would write into the folder of the job that is resumed."""
    work_dir = tmp_path / 'work'
    with launched(config, work_dir, 1) as job:
        wait_for(is_training(work_dir), 200, 'no checkpoint')
        ranks = children(job.pid)
        job.kill()
        wait_for(lambda: not any(map(is_running, ranks)), BOUND, 'processes are left')
    assert newest_epoch(work_dir) < 8


def test_a_killed_node_ends_the_other(config, tmp_path):
    """Two nodes of one process; all of the second one is killed at once."""
    work_dir = tmp_path / 'work'
    nodes = dict(NNODES='2', MASTER_ADDR='127.0.0.1', PORT=str(free_port()))
    with (
        launched(config, work_dir, 1, NODE_RANK='0', **nodes) as first,
        launched(config, work_dir, 1, NODE_RANK='1', **nodes) as second,
    ):
        wait_for(is_training(work_dir), 200, 'no checkpoint')
        os.killpg(second.pid, signal.SIGKILL)
        for rank in children(second.pid):
            os.kill(rank, signal.SIGKILL)
        status = end_of(first)
        assert status != 0


def test_a_rank_that_hangs_ends_the_job(config, tmp_path):
    """No connection is closed: the timeout of the config decides."""
    work_dir = tmp_path / 'work'
    timeout = 'env_cfg.dist_cfg.timeout=10'
    first, second = start_ranks(config, work_dir, '--cfg-options', timeout)
    wait_for(is_training(work_dir), 200, 'no checkpoint')
    os.kill(second.pid, signal.SIGSTOP)
    try:
        first.join(BOUND)
        assert first.exitcode not in (None, 0)
    finally:
        second.kill()
        first.kill()


POISON = """
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class Poison(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        model, loss = runner.model.module, runner.model.module.loss
        if get_rank() == 1 and runner.iter == 4:
            def once(*args, **kwargs):
                model.loss = loss
                return {key: value * float('nan') for key, value in loss(*args, **kwargs).items()}
            model.loss = once


@HOOKS.register_module()
class Dump(Hook):
    def after_train(self, runner):
        import torch
        torch.save(runner.model.module.state_dict(), f'{runner.work_dir}/rank{get_rank()}.pt')
"""


@pytest.mark.parametrize('action', ['stop', 'skip'])
def test_a_loss_that_is_nan_on_one_rank(action, shapes, tmp_path):
    (tmp_path / 'poison.py').write_text(POISON)
    extra = (
        f"import sys\nsys.path.insert(0, '{tmp_path}')\ndel sys\n"
        "custom_imports = dict(imports=['poison'])\n"
        "custom_hooks = [dict(type='Poison'), dict(type='Dump')]\n"
    )
    config = write_config(tmp_path / 'config.py', shapes, epochs=4, extra=extra)
    work_dir = tmp_path / 'work'
    ranks = start_ranks(
        config, work_dir, '--cfg-options', f'default_hooks.non_finite.action={action}'
    )
    if action == 'skip':
        finish(*ranks)
        first, second = (torch.load(work_dir / f'rank{i}.pt') for i in range(2))
        assert all(torch.equal(value, second[key]) for key, value in first.items())
        assert all(v.isfinite().all() for v in first.values())
        message = 'a gradient is not finite at iteration 5 on rank 0'  # the mean of all ranks'
        assert message in ranks[0].log.read_text()
        return
    for rank in ranks:
        rank.join(BOUND + 60)
        assert rank.exitcode not in (None, 0)
    message = (
        r'error: loss is nan at iteration 5 on rank 1 \(base_lr \S+, lr \S+; last checkpoint: '
    )
    assert re.search(f'{message}{work_dir}/epoch_2.pth', ranks[1].log.read_text())
    assert last_epoch(work_dir) == 2

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Trainings of the quickstart's classifier, killed again and again at random moments.

python -m pytest -m soak -s tests/test_reliability/test_soak.py
"""

import random
import signal
import time
from collections import Counter
from functools import partial

import pytest
from conftest import run_tool
from faults import (
    assert_same_result,
    finish,
    group,
    last_epoch,
    newest_epoch,
    resumed_epoch,
    start,
    start_ranks,
    wait_for,
    write_config,
)

pytestmark = pytest.mark.soak
report = partial(print, flush=True)
EPOCHS = 8
BOUND = 60  # seconds until the other rank ends


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp('soak')
    shapes = folder / 'shapes'
    numbers = ['--num-train', 48, '--num-val', 16, '--num-demo', 1, '--size', 96]
    run_tool('tools/misc/make_shapes.py', shapes, *numbers)
    return write_config(folder / 'config.py', shapes, arch='b0', epochs=EPOCHS, batch_size=8)


def reference(config, work_dir, ranks):
    """An undisturbed training: seconds until its first checkpoint, and of an epoch."""
    begin = time.monotonic()
    processes = (
        start_ranks(config, work_dir, ranks=ranks) if ranks > 1 else [start(config, work_dir)]
    )

    def is_under_way():
        return newest_epoch(work_dir) > 0 or not processes[0].is_alive()

    first = wait_for(is_under_way, 600, 'no checkpoint')
    finish(*processes, timeout=1200)
    return first, (time.monotonic() - begin - first) / (EPOCHS - 1)


class Soak:
    """Trainings that are killed and resumed until they are at their end, one after the other."""

    def __init__(self, config, folder, ranks):
        self.random = random.Random(0)
        self.config, self.folder, self.ranks = config, folder, ranks
        self.kills = Counter()
        self.before = Counter()  # kills that happened before the process had resumed
        self.finished = 0
        self.slowest = 0.0  # seconds until the last process ended
        self.reference = folder / 'reference'
        self.first, self.epoch = reference(config, self.reference, ranks)
        report(f'{self.first:.0f} s until the first checkpoint, {self.epoch:.1f} s per epoch')

    def run(self, kills, kinds):
        while sum(self.kills.values()) < kills:
            work_dir = self.folder / f'work_{self.finished}'
            self.to_the_end(work_dir, kills, kinds)
            assert_same_result(work_dir, self.reference)
            self.finished += 1
        report(
            f'{dict(self.kills)}, before resuming {dict(self.before)}; {self.finished} trainings'
        )
        report(f'the other rank and all workers ended within {self.slowest:.1f} s')

    def to_the_end(self, work_dir, kills, kinds):
        epoch = 0
        while True:
            kind = kinds[sum(self.kills.values()) % len(kinds)]
            if sum(self.kills.values()) >= kills:
                kind = None
            killed, processes = self.attempt(work_dir, kind)
            resumed = resumed_epoch(processes[0])
            assert resumed in (None, epoch)
            assert last_epoch(work_dir) >= epoch
            if not killed:
                return
            epoch = last_epoch(work_dir)
            self.kills[kind] += 1
            self.before[kind] += resumed is None
            report(f'{sum(self.kills.values())}: {kind}, from epoch {resumed} to {epoch}')

    def attempt(self, work_dir, kind):
        """Whether a training was killed before its end, and its processes."""
        crash = self.random.randint(1, 12) if kind == 'file operation' else None
        if self.ranks > 1:
            processes = start_ranks(self.config, work_dir, ranks=self.ranks)
        else:
            processes = [start(self.config, work_dir, crash=crash)]
        victim = self.random.choice(processes)
        delay = self.random.uniform(self.first / 2, self.first + self.epoch)
        if kind in ('SIGKILL', 'SIGTERM'):
            victim.join(delay)
        elif kind == 'writing':
            begin = time.monotonic()
            # from some moment on, the next time that a checkpoint is half written
            while victim.is_alive() and (
                time.monotonic() - begin < delay or not any(work_dir.glob('epoch_*.pth.partial'))
            ):
                time.sleep(0.001)
        else:
            victim.join(1200)
        if victim.is_alive():
            victim.terminate() if kind == 'SIGTERM' else victim.kill()
        begin = time.monotonic()
        for process in processes:
            process.join(BOUND)
            assert process.exitcode is not None, f'still running {BOUND} s after {kind}'
        codes = {process.exitcode for process in processes}
        if codes == {0}:
            return False, processes
        assert victim.exitcode in (-signal.SIGKILL, -signal.SIGTERM), victim.log.read_text()[-4000:]
        assert 0 not in codes or newest_epoch(work_dir) == EPOCHS
        for process in processes:
            wait_for(lambda: not group(process), 30, 'data workers are left')  # noqa: B023
        self.slowest = max(self.slowest, time.monotonic() - begin)
        return True, processes


def test_one_process(config, tmp_path):
    kinds = ('SIGKILL', 'file operation', 'SIGTERM', 'writing')
    Soak(config, tmp_path, 1).run(24, kinds)


def test_one_of_two_ranks(config, tmp_path):
    Soak(config, tmp_path, 2).run(12, ('SIGKILL', 'SIGTERM', 'writing'))

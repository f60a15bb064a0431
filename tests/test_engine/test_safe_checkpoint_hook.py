# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import errno
import logging
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from mmengine.logging import MMLogger
from toy import Recorder, build_runner

from mmlinglo.engine import SafeCheckpointHook, TrainingError
from mmlinglo.engine.safe_checkpoint_hook import WholeFileBackend


def names(folder):
    return sorted(p.name for p in folder.iterdir() if p.suffix in ('.pth', '.partial'))


def is_whole(path):
    try:
        torch.load(path, weights_only=False)
    except Exception:
        return False
    return True


@pytest.fixture
def moments(tmp_path, monkeypatch):
    """Whole checkpoints in ``tmp_path`` before each renaming, and before and after each removal."""
    seen = []

    def look():
        seen.append([p.name for p in sorted(tmp_path.glob('*.pth')) if is_whole(p)])
        assert len(seen[-1]) == len(list(tmp_path.glob('*.pth')))

    def remove(path, **kwargs):
        look()
        assert is_whole((tmp_path / 'last_checkpoint').read_text())
        unlink(path, **kwargs)
        look()

    replace, unlink = os.replace, Path.unlink
    monkeypatch.setattr(os, 'replace', lambda *args: (look(), replace(*args)))
    monkeypatch.setattr(Path, 'unlink', remove)
    return seen


def test_there_is_a_whole_checkpoint_at_every_moment(moments, tmp_path):
    build_runner(tmp_path, checkpoint=dict(max_keep_ckpts=1)).train()
    # each is renamed, then the one before is removed
    assert moments == [
        [],
        ['epoch_1.pth'], ['epoch_1.pth', 'epoch_2.pth'], ['epoch_2.pth'],
        ['epoch_2.pth'], ['epoch_2.pth', 'epoch_3.pth'], ['epoch_3.pth'],
        ['epoch_3.pth'], ['epoch_3.pth', 'epoch_4.pth'], ['epoch_4.pth'],
    ]  # fmt: skip
    assert names(tmp_path) == ['epoch_4.pth']
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'epoch_4.pth')


@pytest.mark.parametrize('save_best', ['score', 'auto', ['score']])
def test_the_best_checkpoint_is_replaced_after_the_new_one_is_saved(moments, save_best, tmp_path):
    checkpoint = dict(max_keep_ckpts=1, save_best=save_best, rule='greater')
    build_runner(tmp_path, checkpoint=checkpoint, scores=[1, 3, 2, 4], val_interval=1).train()
    first = next(i for i, moment in enumerate(moments) if 'best_score_epoch_1.pth' in moment)
    assert all(any('best' in name for name in moment) for moment in moments[first:])
    assert names(tmp_path) == ['best_score_epoch_4.pth', 'epoch_4.pth']
    bests = {name for moment in moments for name in moment if 'best' in name}
    assert bests == {f'best_score_epoch_{i}.pth' for i in (1, 2, 4)}


def test_several_best_checkpoints(tmp_path):
    checkpoint = dict(save_best=['score', 'other'], rule=['greater', 'less'])
    runner = build_runner(tmp_path, checkpoint=checkpoint)
    hook = next(hook for hook in runner.hooks if isinstance(hook, SafeCheckpointHook))
    seen = []

    def after_val_epoch(runner, metrics):
        metrics = [dict(score=1.0, other=1.0), dict(score=0.0, other=0.5)][len(seen)]
        SafeCheckpointHook.after_val_epoch(hook, runner, metrics)
        seen.append([name for name in names(tmp_path) if 'best' in name])

    hook.after_val_epoch = after_val_epoch
    runner.train()
    assert seen == [
        ['best_other_epoch_2.pth', 'best_score_epoch_2.pth'],
        ['best_other_epoch_4.pth', 'best_score_epoch_2.pth'],
    ]


def write_checkpoint(path, time):
    torch.save(dict(weights=torch.zeros(1000)), path)
    os.utime(path, (time, time))


@pytest.fixture
def before_run(tmp_path, caplog):
    """What a run in ``tmp_path`` decides to resume from: (resume, load_from)."""
    logger = logging.getLogger('test')

    def decide(**kwargs):
        runner = SimpleNamespace(
            _resume=True, _load_from=None, work_dir=str(tmp_path), logger=logger
        )
        with caplog.at_level('INFO'):
            SafeCheckpointHook(**kwargs).before_run(runner)
        return runner._resume, runner._load_from

    return decide


def test_resume_takes_what_last_checkpoint_names(before_run, tmp_path):
    write_checkpoint(tmp_path / 'epoch_9.pth', 1)  # of an older run
    write_checkpoint(tmp_path / 'epoch_2.pth', 2)
    (tmp_path / 'last_checkpoint').write_text(f'{tmp_path}/epoch_2.pth')
    assert before_run() == (True, f'{tmp_path}/epoch_2.pth')


def test_resume_takes_a_newer_one_whose_name_was_not_written_yet(before_run, tmp_path):
    write_checkpoint(tmp_path / 'epoch_2.pth', 1)
    write_checkpoint(tmp_path / 'epoch_3.pth', 2)
    (tmp_path / 'last_checkpoint').write_text(f'{tmp_path}/epoch_2.pth')
    assert before_run() == (True, f'{tmp_path}/epoch_3.pth')


@pytest.mark.parametrize('pointer', [None, '', 'epoch_4.pth', 'epoch_5.pth'])
def test_resume_falls_back_to_the_newest_whole_one(pointer, before_run, tmp_path, caplog):
    """last_checkpoint is missing, empty, names half a file, or names none."""
    for step in (1, 2, 3):
        write_checkpoint(tmp_path / f'epoch_{step}.pth', step)
    half = (tmp_path / 'epoch_3.pth').read_bytes()[:-100]
    (tmp_path / 'epoch_4.pth').write_bytes(half)
    write_checkpoint(tmp_path / 'best_score_epoch_3.pth', 9)
    write_checkpoint(tmp_path / 'iter_10.pth', 9)
    if pointer is not None:
        pointer = f'{tmp_path}/{pointer}' if pointer else ''
        (tmp_path / 'last_checkpoint').write_text(pointer)
    assert before_run() == (True, f'{tmp_path}/epoch_3.pth')
    if pointer:
        assert f'names {pointer}, which is not a complete checkpoint' in caplog.text
    assert before_run(by_epoch=False) == (True, f'{tmp_path}/iter_10.pth')


@pytest.mark.parametrize('pointer', [None, ''])
def test_resume_starts_anew_if_there_is_nothing(pointer, before_run, tmp_path, caplog):
    """Killed before the first checkpoint."""
    if pointer is not None:
        (tmp_path / 'last_checkpoint').write_text(pointer)
    assert before_run() == (False, None)
    assert 'starting anew' in caplog.text


def test_resume_refuses_to_start_anew_by_itself(before_run, tmp_path):
    (tmp_path / 'last_checkpoint').write_text('/elsewhere/epoch_4.pth')
    with pytest.raises(TrainingError, match=r'names /elsewhere/epoch_4.pth.*restore it, or remove'):
        before_run()


def test_what_a_killed_run_left_behind_is_removed(tmp_path):
    """Half a file, and an outdated checkpoint if it was killed before its removal."""
    first = build_runner(tmp_path, length=2, checkpoint=dict(max_keep_ckpts=1))
    first.train()
    other = tmp_path / 'other'
    build_runner(other, length=1).train()
    (other / 'epoch_1.pth').rename(tmp_path / 'epoch_1.pth')
    (tmp_path / 'epoch_3.pth.partial').write_bytes(b'half')
    (tmp_path / 'last_checkpoint.partial').write_bytes(b'')
    (tmp_path / 'notes.txt').write_text('mine')
    build_runner(tmp_path, length=2, checkpoint=dict(max_keep_ckpts=1), resume=True).train()
    assert names(tmp_path) == ['epoch_2.pth']
    assert (tmp_path / 'notes.txt').exists()


def test_killed_before_the_best_one_before_is_removed(tmp_path, monkeypatch):
    settings = dict(checkpoint=dict(save_best='score', rule='greater'), val_interval=1)
    runner = build_runner(tmp_path, scores=[1, 2], **settings)
    with monkeypatch.context() as patch:
        patch.setattr(Path, 'unlink', mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            runner.train()
    bests = [f'best_score_epoch_{i}.pth' for i in (1, 2)]
    assert [name for name in names(tmp_path) if 'best' in name] == bests
    # a repeated validation may have another score, and the best one the same name
    build_runner(tmp_path, scores=[3, 1, 1], resume=True, **settings).train()
    assert [name for name in names(tmp_path) if 'best' in name] == bests[1:]


def test_nothing_is_removed_from_another_work_dir(tmp_path):
    """mmengine's hook removes the best checkpoint of the run that was resumed elsewhere."""
    settings = dict(
        checkpoint=dict(max_keep_ckpts=1, save_best='score', rule='greater'), val_interval=1
    )
    first, second = tmp_path / 'first', tmp_path / 'second'
    build_runner(first, length=2, scores=[1, 2], **settings).train()
    before = names(first)
    load_from = str(first / 'epoch_2.pth')
    build_runner(second, scores=[2, 3, 4], resume=True, load_from=load_from, **settings).train()
    assert names(first) == before == ['best_score_epoch_2.pth', 'epoch_2.pth']
    assert names(second) == ['best_score_epoch_4.pth', 'epoch_4.pth']


def test_an_interrupted_validation_is_repeated(tmp_path):
    """The run was killed in the second validation: its score counts after the resume."""
    settings = dict(checkpoint=dict(save_best='score', rule='greater'), val_interval=1)

    class Killed(Recorder):
        def before_val(self, runner):
            super().before_val(runner)
            if len(self.validations) == 2:
                raise KeyboardInterrupt

    killed = Killed()
    with pytest.raises(KeyboardInterrupt):
        build_runner(tmp_path, hooks=[killed], scores=[1], **settings).train()
    assert names(tmp_path) == ['best_score_epoch_1.pth', 'epoch_1.pth', 'epoch_2.pth']
    resumed = Recorder()
    build_runner(tmp_path, hooks=[resumed], scores=[5, 2, 3], resume=True, **settings).train()
    assert [epoch for epoch, _ in resumed.validations] == [2, 3, 4]
    assert [name for name in names(tmp_path) if 'best' in name] == ['best_score_epoch_2.pth']


def test_no_validation_is_added_where_none_is_due(tmp_path):
    settings = dict(by_epoch=False, checkpoint=dict(save_best='score', rule='greater'))
    build_runner(tmp_path, length=3, scores=[1], **settings).train()
    resumed = Recorder()
    build_runner(tmp_path, hooks=[resumed], scores=[1, 2], resume=True, **settings).train()
    assert [iteration for _, iteration in resumed.validations] == [6, 12]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', str(folder)]
    try:
        result = subprocess.run(mount, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f'needs mount: {error}')
    if result.returncode:
        pytest.skip(f'may not mount a file system: {result.stderr}')
    yield folder
    # mmengine's last logger stays the current one of the process: the next test would write there
    for logger in MMLogger._instance_dict.values():
        for handler in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:
            if str(folder) in handler.baseFilename:
                logger.removeHandler(handler)
                handler.close()
    subprocess.run(['umount', '--lazy', str(folder)], check=True)


def test_full_disk(small_disk):
    """What was there stays, nothing half is left, the message has the numbers."""
    path = small_disk / 'epoch_1.pth'
    backend = WholeFileBackend()
    backend.put(bytes(1_200_000), path)
    message = r'epoch_1.pth needs 1.5 MB, but \S+/disk has only 0.9 MB free \(No space left'
    with pytest.raises(TrainingError, match=message):
        backend.put(bytes(1_500_000), path)
    assert names(small_disk) == ['epoch_1.pth']
    assert path.stat().st_size == 1_200_000


def test_training_until_the_disk_is_full(small_disk):
    """The checkpoint before stays the one to resume from, the best and the outdated one included."""
    work = small_disk / 'work'
    settings = dict(checkpoint=dict(max_keep_ckpts=1, save_best='score', rule='greater'))
    build_runner(work, length=2, scores=[1], **settings).train()
    before = {name: (work / name).read_bytes() for name in names(work)}
    pointer = (work / 'last_checkpoint').read_text()
    (small_disk / 'filler').write_bytes(bytes(shutil.disk_usage(small_disk).free - 12_000))
    with pytest.raises(TrainingError, match=r'epoch_3.pth needs'):
        build_runner(work, scores=[1, 2], resume=True, **settings).train()
    assert {name: (work / name).read_bytes() for name in names(work)} == before
    assert (work / 'last_checkpoint').read_text() == pointer


def test_other_errors_are_passed_on_and_leave_nothing(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, 'broken')

    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(OSError, match='broken'):
        WholeFileBackend().put(b'1', tmp_path / 'a.pth')
    assert not list(tmp_path.iterdir())


def test_remote_checkpoints_are_left_to_mmengine():
    """Nothing local is searched or assumed."""
    runner = SimpleNamespace(_resume=True, _load_from=None, work_dir='/nowhere', logger=None)
    SafeCheckpointHook(backend_args=dict(backend='local')).before_run(runner)
    assert (runner._resume, runner._load_from) == (True, None)
    assert not Path('/nowhere').exists()

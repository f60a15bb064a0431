# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""``tools/train.py`` on a file system that fills up."""

import re
import shutil
import subprocess

import pytest
from faults import checkpoints, finish, last_epoch, start, write_config

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path):
    """A file system of 20 MB."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=20m', 'tmpfs', str(folder)]
    if shutil.which('mount') is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('may not mount a file system')
    yield folder
    subprocess.run(['umount', '--lazy', str(folder)], check=True)


def test_full_disk_ends_the_training_and_room_lets_it_go_on(disk, shapes, tmp_path):
    config = write_config(tmp_path / 'config.py', shapes, epochs=3)
    work_dir = disk / 'work'
    finish(start(config, work_dir, '--cfg-options', 'train_cfg.max_epochs=1'))
    size = (work_dir / 'epoch_1.pth').stat().st_size
    filler = disk / 'filler'
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - size // 2))
    before = checkpoints(work_dir).keys()
    process = start(config, work_dir)
    process.join(120)
    assert process.exitcode == 1
    message = rf'error: epoch_2.pth needs (\S+) MB, but {work_dir} has only (\S+) MB free'
    needed, free = map(float, re.findall(message, process.log.read_text())[-1])
    assert needed > free
    assert checkpoints(work_dir).keys() == before
    assert not list(work_dir.glob('*.partial'))
    filler.unlink()
    finish(start(config, work_dir))
    assert last_epoch(work_dir) == 3

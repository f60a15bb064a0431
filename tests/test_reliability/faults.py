# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Trainings to be killed: tools/train.py in processes of a server that has imported torch and the toolboxes."""

import itertools
import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from conftest import ROOT, TINY_ARCH
from mmengine.runner import Runner

QUICKSTART = ROOT / 'configs/quickstart/linglo-b0_2xb16-8e_shapes.py'
CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['mmengine.runner', 'mmpretrain.apis'])


def write_config(path, shapes, *, arch=None, epochs=6, batch_size=4, extra=''):
    """The quickstart's classifier with drop path; one checkpoint and the best one are kept."""
    arch = dict(TINY_ARCH) if arch is None else arch
    model = dict(backbone=dict(arch=arch, drop_path_rate=0.1))
    if isinstance(arch, dict):
        arch['_delete_'] = True
        model['head'] = dict(in_channels=arch['embed_dims'][-1])
    data = f"dataset=dict(data_root='{shapes}/imagenet')"
    lines = [
        f"_base_ = '{QUICKSTART}'",
        f'model = {model}',
        f'train_dataloader = dict(batch_size={batch_size}, {data})',
        f'val_dataloader = dict({data})',
        'test_dataloader = val_dataloader',
        f'train_cfg = dict(max_epochs={epochs}, val_interval=1)',
        'default_hooks = dict(checkpoint=dict(max_keep_ckpts=1), logger=dict(interval=1))',
        'log_processor = dict(window_size=1)',  # each loss, no averages
        'randomness = dict(seed=0)',
    ]
    path.write_text('\n'.join([*lines, extra]))
    return path


def start(config, work_dir, *options, rank=0, ranks=1, port=None, crash=None):
    """Start ``tools/train.py --resume``, as one of several ranks if need be.

    Args:
        crash: The process kills itself before the so-manieth operation on a checkpoint file, counting
            files opened for writing, renamed and removed.
    """
    work_dir = Path(work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    argv = [str(ROOT / 'tools/train.py'), str(config), '--work-dir', str(work_dir)]
    argv += ['--resume', '--verbose']  # tests read the log
    environment = dict(CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1')
    if ranks > 1:
        argv += ['--launcher', 'pytorch']
        environment.update(
            RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks,
            MASTER_ADDR='127.0.0.1', MASTER_PORT=port,
        )  # fmt: skip
    environment = {key: str(value) for key, value in environment.items()}
    log = work_dir.parent / f'{work_dir.name}_rank{rank}.txt'
    args = (argv + [str(option) for option in options], environment, log, work_dir, crash)
    process = CONTEXT.Process(target=_train, args=args)
    process.start()
    process.log = log
    return process


def start_ranks(config, work_dir, *options, ranks=2):
    port = free_port()
    return [start(config, work_dir, *options, rank=i, ranks=ranks, port=port) for i in range(ranks)]


def finish(*processes, timeout=300):
    """Wait, and require that they end well."""
    for process in processes:
        process.join(timeout)
        assert process.exitcode == 0, process.log.read_text()[-4000:]


def children(pid):
    """Processes that a process has started and that are running."""
    path = Path(f'/proc/{pid}/task/{pid}/children')
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def _train(argv, environment, log, work_dir, crash):
    os.setpgid(0, 0)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(log.parent)  # mmengine gathers metrics in a folder of the current one
    os.environ.update(environment)
    torch.set_num_threads(1)
    Runner._log_env = lambda *_: None  # starts compilers to learn their versions
    if crash is not None:
        _crash_at(crash, str(work_dir))
    sys.argv = argv
    sys.path.insert(0, str(ROOT))
    runpy.run_path(argv[0], run_name='__main__')


def _crash_at(number, work_dir):
    operations = itertools.count(1)

    def look(event, args):
        if event not in ('open', 'os.rename', 'os.remove') or not isinstance(args[0], (str, Path)):
            return
        path = str(args[0])
        is_checkpoint = path.startswith(work_dir) and re.search(r'\.pth|last_checkpoint', path)
        writes = event != 'open' or 'w' in str(args[1])
        if is_checkpoint and writes and next(operations) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def wait_for(condition, timeout, what):
    """Wait until a condition holds: the seconds it took."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > timeout:
            raise AssertionError(f'{what}: not within {timeout} s')
        time.sleep(0.05)
    return time.monotonic() - begin


def losses(work_dir):
    """Loss of each iteration; of a repeated one that of the last run."""
    found = {}
    for path in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            entry = json.loads(line) if line.endswith('}') else {}  # a killed run's last line
            if 'loss' in entry:
                found[entry['step']] = entry['loss']
    return found


def checkpoints(work_dir):
    """All checkpoints by name, each of which must be whole."""
    return {p.name: torch.load(p, weights_only=False) for p in sorted(work_dir.glob('*.pth'))}


def last_epoch(work_dir):
    """Epoch of the newest regular checkpoint, 0 if there is none; whatever is there must be whole."""
    found = checkpoints(work_dir)
    return max([v['meta']['epoch'] for k, v in found.items() if k.startswith('epoch')], default=0)


def newest_epoch(work_dir):
    """The same by the names of the files, for while the training goes on."""
    numbers = (p.stem.split('_')[1] for p in work_dir.glob('epoch_*.pth'))
    return max(map(int, numbers), default=0)


def resumed_epoch(process):
    """The epoch that a run says it resumed; None if it was killed before."""
    found = re.search(r'resumed epoch: (\d+)|(starting anew)', process.log.read_text())
    return found and int(found.group(1) or 0)


def group(process):
    """Running processes that a training has started, itself included."""
    found = []
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try:
            state, _, pgrp = stat.read_text().rpartition(') ')[2].split()[:3]
        except OSError:  # it has ended
            continue
        if int(pgrp) == process.pid and state != 'Z':
            found.append(int(stat.parent.name))
    return found


def assert_same_result(work_dir, reference):
    """Bitwise the same losses, and the same last and best checkpoint: weights, optimizer, schedulers."""
    assert losses(work_dir) == losses(reference)
    first, second = checkpoints(work_dir), checkpoints(reference)
    assert first.keys() == second.keys()
    assert any(name.startswith('best') for name in first)
    for name, checkpoint in first.items():
        for part in ('state_dict', 'optimizer', 'param_schedulers'):
            assert same(checkpoint.get(part), second[name].get(part)), (name, part)
    assert not list(work_dir.glob('*.partial'))


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""All that waits for a GPU, step by step: tools/gpu_day.sh."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, TextIO, Tuple

import cv2
import numpy as np
import torch

from mmlinglo.analysis.report import format_table, provenance

Command = Tuple[str, ...]
TOOLS = 'tools/analysis_tools'
PEERS = ['linglo_b0', 'linglo_b1', 'linglo_b2', 'pvt_v2_b0', 'pvt_v2_b1', 'pvt_v2_b2']
PEERS += ['swiftformer_xs', 'swiftformer_l1', 'fastvit_t8', 'fastvit_sa12', 'convnext_tiny']
# Height and width, and number of images, of the comparison; what tells most comes first.
SETTINGS = [
    ((224, 224), 128),
    ((800, 1344), 2),
    ((224, 224), 16),
    ((512, 512), 16),
    ((224, 224), 2),
    ((512, 512), 2),
    ((800, 1344), 16),
    ((512, 512), 128),
    ((800, 1344), 128),
]
COLUMNS = dict(step='Step', status='Status', seconds='Seconds', reason='Reason')


class Step(NamedTuple):
    """Something to be done on a GPU.

    Attributes:
        name: Of its files.
        title: What it tells.
        minutes: Time that it may take at most.
        commands: Command lines, each starting with a script of this checkout, or ``-m`` and a module.
        needs: Packages without which it is skipped.
        data: Folder without which it is skipped.
    """

    name: str
    title: str
    minutes: float
    commands: Sequence[Command]
    needs: Tuple[str, ...] = ()
    data: Optional[Path] = None


def plan(out: Path, rehearse: bool) -> List[Step]:
    """All steps, in the order of their worth.

    Args:
        out: Folder of the results.
        rehearse: Whether to take toy sizes, on a CPU.
    """
    toy = ('--rehearse', '--rounds', '2') if rehearse else ()
    check = f'{TOOLS}/check_gpu.py'

    def checking(what: str) -> List[Command]:
        return [(check, what, '--out', str(out / what), *toy)]

    size = ('--sizes', '64', '--rounds', '2') if rehearse else ('--batch-size', '16')
    attention = (f'{TOOLS}/benchmark_attention.py', '--out', str(out / 'attention'), *size)
    trained = ('mmdet', 'mmcv._ext')
    return [
        Step('environment', 'Environment', 2, [('-m', 'mmlinglo.check_env')]),
        Step('checks', 'Correctness on this device', 5, checking('checks')),
        Step('forms', "A training step in each of LinGlo's forms", 5, checking('forms'), ('timm',)),
        Step('backbones', 'Comparison of backbones', 6, list(_backbones(out, rehearse)), ('timm',)),
        Step('attention', "Attention, the paper's Fig. 4", 3, [attention]),
        Step(
            'recipes',
            'Training steps of RetinaNet and SemanticFPN',
            3,
            checking('recipes'),
            (*trained, 'mmseg'),
        ),
        Step('quickstart', 'Quickstart', 5, list(_quickstart(out, rehearse)), trained),
        _campaign(out, rehearse),
    ]


def _backbones(out: Path, rehearse: bool) -> Iterator[Command]:
    tool = f'{TOOLS}/benchmark_backbones.py'
    if rehearse:
        toy = ('--models', 'linglo_b0', 'pvt_v2_b0', '--rounds', '2', '--no-memory', '--shape')
        for mode in ('train', 'inference'):
            name = str(out / f'backbones_{mode}')
            yield (tool, '--mode', mode, *toy, '64', '64', '--out', name)
        return
    for (shape, batch_size), mode in [(s, m) for s in SETTINGS for m in ('train', 'inference')]:
        for dtype in ('autocast', 'float32'):
            name = 'backbones_{}_{}x{}_batch{}_{}'.format(mode, *shape, batch_size, dtype)
            numbers = ('--shape', *map(str, shape), '--batch-size', str(batch_size))
            forms = ('--forms', 'trained' if mode == 'train' else 'fused')
            how = ('--mode', mode, '--dtype', dtype, '--compile', '--no-memory', *forms)
            yield (tool, '--models', *PEERS, *numbers, *how, '--out', str(out / name))


def _quickstart(out: Path, rehearse: bool) -> Iterator[Command]:
    if not rehearse:
        yield ('tools/quickstart.sh', 'detection')
        return
    data, work_dir = out / 'toy' / 'shapes', str(out / 'toy' / 'quickstart')
    number = ('--num-train', '4', '--num-val', '2', '--num-demo', '1', '--size', '64')
    yield ('tools/misc/make_shapes.py', str(data), *number)
    options = [
        'train_cfg.max_epochs=1',
        'train_cfg.val_interval=1',
        'train_dataloader.batch_size=2',
    ]
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        options += [f'{loader}.dataset.data_root={data}/coco/', f'{loader}.num_workers=0']
        options += [f'{loader}.persistent_workers=False']
    for evaluator in ('val_evaluator', 'test_evaluator'):
        options.append(f'{evaluator}.ann_file={data}/coco/annotations/val.json')
    config = 'configs/quickstart/retinanet_linglo-b0_fpn_2xb4-3e_shapes.py'
    yield ('tools/train.py', config, '--work-dir', work_dir, '--cfg-options', *options)


def _campaign(out: Path, rehearse: bool) -> Step:
    """The rows of the ablation that tell most come first, and a seed after another."""
    tool, data = f'{TOOLS}/run_ablations.py', Path('data/cifar10')
    name, title = 'campaign', 'Ablations on CIFAR-10'
    where = ('--out', str(out / name), '--work-dir')
    if rehearse:
        data = out / 'toy' / 'cifar10'
        _draw_noise(data)
        options = ['train_dataloader.batch_size=4', 'train_dataloader.dataset.pipeline.3.scale=32']
        options += ['val_dataloader.dataset.pipeline.1.scale=32']
        for loader in ('train_dataloader', 'val_dataloader'):
            options += [f'{loader}.num_workers=0', f'{loader}.persistent_workers=False']
        toy = ('--rows', 'linglo-b0', '--epochs', '2', '--data-format', 'folder', '--seeds', '0')
        given = ('--data-root', str(data), '--cfg-options', *options)
        command = (tool, *where, str(out / 'toy' / name), *toy, *given)
        return Step(name, title, 10, [command], ('mmpretrain',))
    first = ('linglo-b0', 'linglo-b0-cpe', 'linglo-b0-dot-product', 'pvtv2-b0', 'resnet18')
    others = ('linglo-b0-p-cpe', 'linglo-b0-r-cpe', 'linglo-b0-wo-c', 'linglo-b0-wo-ch')
    # What is finished is not trained again, and the last table holds all.
    parts = [(first, ['0']), (first, ['0', '1']), ((*first, *others), ['0', '1'])]
    commands = [
        (tool, *where, 'work_dirs/ablations_cifar10', '--rows', *rows, '--seeds', *seeds)
        for rows, seeds in parts
    ]
    return Step(name, title, 600, commands, ('mmpretrain',), data)


def _draw_noise(folder: Path) -> None:
    """Two training images and a test image of each class, in folders like those of CIFAR-10."""
    rng = np.random.default_rng(0)
    for split, number in (('train', 2), ('test', 1)):
        for path in [folder / split / f'class{label}' for label in range(10)]:
            path.mkdir(parents=True, exist_ok=True)
            for i in range(number):
                image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                cv2.imwrite(str(path / f'{i}.png'), image)


def run_steps(
    root: Path, out: Path, steps: Sequence[Step], minutes: float, resume: bool = False
) -> Iterator[Tuple[Step, dict]]:
    """Run the steps one after another; write ``steps.json`` and ``summary.md`` after each.

    Args:
        root: The checkout.
        out: Folder of the results.
        steps: From :func:`plan`.
        minutes: For all of them together.
        resume: Whether steps, and commands of steps, that ``out`` says are done are not done again.

    Yields:
        Each step that was not done before, with its status, seconds, reason and finished commands.
    """
    start, path = time.monotonic(), out / 'steps.json'
    done: Dict[str, dict] = json.loads(path.read_text()) if resume and path.is_file() else {}
    source = provenance('cuda' if torch.cuda.is_available() else 'cpu', minutes=minutes)
    for step in steps:
        before = done.get(step.name, {})
        if before.get('status') == 'done':
            continue
        left = 60 * minutes - (time.monotonic() - start)
        limit = min(60 * step.minutes, left)
        reason = _missing(step)
        if reason or left < 1:
            reason = reason or 'the time was over'
            done[step.name] = dict(before, status='skipped', seconds=0, reason=reason)
        else:
            done[step.name] = _run_step(root, out, step, limit, before.get('finished', []))
        path.write_text(json.dumps(done, indent=2) + '\n')
        page = summarize(out, steps, done, source)
        for folder, name in ((str(root), '.'), (sys.prefix, 'PYTHON')):  # of this machine
            page = page.replace(folder, name)
        (out / 'summary.md').write_text(page)
        yield step, done[step.name]


def _missing(step: Step) -> str:
    """Why a step cannot be run here, or an empty text."""
    packages = [name for name in step.needs if not _is_there(name)]
    if packages:
        return f'needs {", ".join(packages)}'
    if 'mmcv._ext' in step.needs and torch.cuda.is_available():
        from mmcv.ops import get_compiling_cuda_version

        if get_compiling_cuda_version() == 'not available':
            return 'needs an mmcv that was built with CUDA operators'
    if step.data is not None and not step.data.is_dir():
        return f'needs the data in {step.data}'
    return ''


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _run_step(root: Path, out: Path, step: Step, limit: float, finished: List[str]) -> dict:
    """Run a step's commands, each into the step's log, until one fails or the time is over."""
    start, status, reason = time.monotonic(), 'done', ''
    with open(out / f'{step.name}.log', 'a' if finished else 'w') as log:
        for command in step.commands:
            text = ' '.join(command)
            if text in finished:
                continue
            print(f'$ {text}', file=log, flush=True)
            left = limit - (time.monotonic() - start)
            code = _call(root, command, log, left)
            if code is None:
                status, reason = 'stopped', f'{limit:.0f} s were over'
                break
            if code:
                status, reason = 'failed', f'status {code}, see {step.name}.log'
            else:
                finished = [*finished, text]
    seconds = round(time.monotonic() - start)
    return dict(status=status, seconds=seconds, reason=reason, finished=finished)


def _call(root: Path, command: Command, log: TextIO, limit: float) -> Optional[int]:
    """Exit status of a command, or None if it was stopped together with all that it started."""
    program = 'bash' if command[0].endswith('.sh') else sys.executable
    environment = dict(os.environ, PYTHON=sys.executable)
    process = subprocess.Popen(
        [program, *command],
        cwd=root,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(max(limit, 0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def summarize(out: Path, steps: Sequence[Step], done: Dict[str, dict], source: dict) -> str:
    """A page with what became of each step, and the tables that its commands printed."""
    rows = [dict(done.get(step.name, dict(status='waits')), step=step.title) for step in steps]
    lines = [f'# {source["device"]}, {source["date"]}', '']
    versions = ', '.join(f'{name} {version}' for name, version in source['versions'].items())
    lines += [f'Commit {source["commit"]}; {versions}.', '', format_table(rows, COLUMNS), '']
    for step in steps:
        log = out / f'{step.name}.log'
        if step.name in done and log.is_file():
            lines += [f'## {step.title}', '', *_tables(log.read_text()), '']
    return '\n'.join(lines)


def _tables(text: str) -> Iterator[str]:
    """The commands in a log and the Markdown tables that they printed; without one, the last lines."""
    for part in f'\n{text}'.split('\n$ ')[1:]:
        command, *lines = part.splitlines()
        yield f'`{command}`'
        table = [line for line in lines if line.startswith('|')]
        yield from ['', *table, ''] if table else ['', '```text', *lines[-40:], '```', '']

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""All that waits for a GPU, step by step: tools/gpu_day.sh."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, TextIO, Tuple

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
    check = f'{TOOLS}/check_gpu.py'
    toy = ('--rehearse', '--rounds', '2') if rehearse else ()
    checks, forms, recipes = (
        [(check, what, '--out', str(out / what), *toy)] for what in ('checks', 'forms', 'recipes')
    )
    size = ('--sizes', '64', '--rounds', '2') if rehearse else ('--batch-size', '16')
    attention = (f'{TOOLS}/benchmark_attention.py', '--out', str(out / 'attention'), *size)
    backbones, trained = list(_backbones(out, rehearse)), ('mmdet', 'mmcv._ext')
    trainings = _rehearse_trainings if rehearse else _list_trainings
    quickstart, campaign = trainings(out)
    data = None if rehearse else Path('data/cifar10')
    title = 'Training steps of RetinaNet and SemanticFPN'
    return [
        Step('environment', 'Environment', 2, [('-m', 'mmlinglo.check_env')]),
        Step('checks', 'Correctness on this device', 5, checks),
        Step('forms', "A training step in each of LinGlo's forms", 5, forms, ('timm',)),
        Step('backbones', 'Comparison of backbones', 6, backbones, ('timm',)),
        Step('attention', "Attention, the paper's Fig. 4", 3, [attention]),
        Step('recipes', title, 3, recipes, (*trained, 'mmseg')),
        Step('quickstart', 'Quickstart', 5, quickstart, trained),
        Step('campaign', 'Ablations on CIFAR-10', 600, campaign, ('mmpretrain',), data),
    ]


def _backbones(out: Path, rehearse: bool) -> Iterator[Command]:
    settings = [((64, 64), 2)] if rehearse else SETTINGS
    models, options = (PEERS[:1], ['--rounds', '2']) if rehearse else (PEERS, ['--compile'])
    forms = dict(train='trained', inference='fused')
    for (shape, number), mode, dtype in product(settings, forms, ('autocast', 'float32')):
        name = 'backbones_{}_{}x{}_batch{}_{}'.format(mode, *shape, number, dtype)
        numbers = ('--shape', *map(str, shape), '--batch-size', str(number), '--no-memory')
        how = ('--mode', mode, '--dtype', dtype, '--forms', forms[mode], *options)
        tool = f'{TOOLS}/benchmark_backbones.py'
        yield (tool, '--models', *models, *numbers, *how, '--out', str(out / name))


def _list_trainings(out: Path) -> Iterator[List[Command]]:
    """The quickstart, and the ablations: rows that tell most come first, and a seed after another."""
    yield [('tools/quickstart.sh', 'detection')]
    first = ('linglo-b0', 'linglo-b0-cpe', 'linglo-b0-dot-product', 'pvtv2-b0', 'resnet18')
    others = ('linglo-b0-p-cpe', 'linglo-b0-r-cpe', 'linglo-b0-wo-c', 'linglo-b0-wo-ch')
    where = ('--out', str(out / 'campaign'), '--work-dir', 'work_dirs/ablations_cifar10')
    # What is finished is not trained again, and the last table holds all.
    yield [
        (f'{TOOLS}/run_ablations.py', *where, '--rows', *rows, '--seeds', *seeds)
        for rows, seeds in ((first, '0'), (first, '01'), ((*first, *others), '01'))
    ]


def _rehearse_trainings(out: Path) -> Iterator[List[Command]]:
    """The quickstart and the campaign, each on a few synthetic shapes."""
    shapes = out / 'toy' / 'shapes'
    number = ('--num-train', '8', '--num-val', '2', '--num-demo', '1', '--size', '64')
    data = ('tools/misc/make_shapes.py', str(shapes), *number)
    config = 'configs/quickstart/retinanet_linglo-b0_fpn_2xb4-3e_shapes.py'
    options = [f'{name}_dataloader.dataset.data_root={shapes}/coco/' for name in ('train', 'val')]
    options += [f'val_evaluator.ann_file={shapes}/coco/annotations/val.json']
    options += ['train_cfg.max_epochs=1', 'train_cfg.val_interval=1']
    how = ('--work-dir', str(out / 'toy' / 'quickstart'), '--cfg-options', *options)
    yield [data, ('tools/train.py', config, *how)]
    options = [f'{name}_dataloader.dataset.data_prefix=val' for name in ('val', 'test')]
    options += ['train_dataloader.batch_size=4']
    where = ('--out', str(out / 'campaign'), '--work-dir', str(out / 'toy' / 'campaign'))
    images = ('--data-format', 'folder', '--data-root', str(shapes / 'imagenet'))
    toy = ('--rows', 'linglo-b0', '--epochs', '2', '--seeds', '0', '--cfg-options', *options)
    yield [data, (f'{TOOLS}/run_ablations.py', *where, *images, *toy)]


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
    end, path = time.monotonic() + 60 * minutes, out / 'steps.json'
    done: Dict[str, dict] = json.loads(path.read_text()) if resume and path.is_file() else {}
    source = provenance('cuda' if torch.cuda.is_available() else 'cpu', minutes=minutes)
    for step in steps:
        before = done.get(step.name, {})
        if before.get('status') == 'done':
            continue
        start, finished = time.monotonic(), before.get('finished', [])
        seconds = min(60 * step.minutes, end - start)
        status, reason = 'skipped', _missing(step) or 'the time was over' * (seconds < 1)
        if not reason:
            status, reason = _run_step(root, out, step, start + seconds, finished)
        seconds = round(time.monotonic() - start)
        row = dict(status=status, seconds=seconds, reason=reason, finished=finished)
        done[step.name] = row
        path.write_text(json.dumps(done, indent=2) + '\n')
        page = summarize(out, steps, done, source)
        for folder, name in ((str(root), '.'), (sys.prefix, 'PYTHON')):  # of this machine
            page = page.replace(folder, name)
        (out / 'summary.md').write_text(page)
        yield step, row


def _missing(step: Step) -> str:
    """Why a step cannot be run here, or an empty text."""
    packages = [name for name in step.needs if importlib.util.find_spec(name) is None]
    if packages:
        return f'needs {", ".join(packages)}'
    if 'mmcv._ext' in step.needs and torch.cuda.is_available():
        from mmcv.ops import get_compiling_cuda_version

        if get_compiling_cuda_version() == 'not available':
            return 'needs an mmcv that was built with CUDA operators'
    if step.data is not None and not step.data.is_dir():
        return f'needs the data in {step.data}'
    return ''


def _run_step(
    root: Path, out: Path, step: Step, end: float, finished: List[str]
) -> Tuple[str, str]:
    """Run a step's commands, each into the step's log, until the time is over; add to ``finished``.

    Returns:
        Status and reason.
    """
    status, reason = 'done', ''
    with open(out / f'{step.name}.log', 'a' if finished else 'w') as log:
        for command in step.commands:
            text = ' '.join(command)
            if text in finished:
                continue
            print(f'$ {text}', file=log, flush=True)
            code = _call(root, command, log, end - time.monotonic())
            if code is None:
                return 'stopped', 'the time was over'
            if code:
                status, reason = 'failed', f'status {code}, see {step.name}.log'
            else:
                finished.append(text)
    return status, reason


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
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                os.killpg(process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(10)


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

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Scalars that trainings logged, as curves (the paper's Fig. 5).

The toolboxes' own ``analyze_logs.py`` draws single log files. It does not join
the files of a resumed training, know several seeds of one model, or say what a
validation step counts; mmdet's cuts ``accuracy/top1`` to ``top1`` and mixes
training and validation values of one name; neither keeps the numbers.
"""

import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Tuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmlinglo.analysis.report import with_suffix

Run = List[Tuple[float, float]]


class Summary(NamedTuple):
    """What several runs logged at one step."""

    step: float
    mean: float
    minimum: float
    maximum: float


def read_scalars(work_dir: Path, key: str) -> Run:
    """Read one scalar that mmengine's ``LocalVisBackend`` logged, over a whole training.

    A resumed training has one ``<timestamp>/vis_data/scalars.json`` for each of
    its parts. They are joined: from the first step that a later part logged, the
    earlier ones no longer count, since the training went on from before it. A
    name that both training and validation lines have, such as ``time``, means the
    training's. Lines of step 0 come from validations outside any training and are
    left out.

    Args:
        work_dir: Work dir of a training, or one of its timestamp folders.
        key: Name of the scalar, such as ``accuracy/top1`` or ``loss``.

    Returns:
        (step, value) in the order of the steps; :func:`step_unit` says what a
        step is.

    Raises:
        FileNotFoundError: If there is no log in ``work_dir``.
        ValueError: If no line has ``key``, or a line is no JSON object.
    """
    parts = _read_parts(Path(work_dir))
    in_training = any(key in line for part in parts for line in part if _is_training(line))
    run: Run = []
    for part in parts:
        points = {
            float(line['step']): float(line[key])
            for line in part
            if key in line and _is_training(line) == in_training
        }
        if points:
            run = [point for point in run if point[0] < min(points)]
            run += sorted(points.items())
    if not run:
        keys = sorted({name for part in parts for line in part for name in line} - _STEP_KEYS)
        raise ValueError(
            f'{str(work_dir)!r} has no scalar {key!r} after step 0; it has: {", ".join(keys)}'
        )
    return run


def step_unit(work_dir: Path, key: str) -> str:
    """What the steps of :func:`read_scalars` count: ``'epoch'`` or ``'iteration'``.

    Training lines count iterations. Validation lines do not say; they count
    epochs if the training's loop is one of epochs.

    Raises:
        FileNotFoundError: If there is no log in ``work_dir``.
        ValueError: If a line is no JSON object.
    """
    training = [line for part in _read_parts(Path(work_dir)) for line in part if _is_training(line)]
    by_epoch = any('epoch' in line for line in training)
    return 'epoch' if by_epoch and not any(key in line for line in training) else 'iteration'


def summarize(runs: Sequence[Run]) -> List[Summary]:
    """Mean and range over runs, at the steps that all of them have.

    A step that some runs lack is left out, for otherwise the mean would change
    when a run ends.

    Raises:
        ValueError: If no step is common to all runs.
    """
    values = defaultdict(list)
    for run in runs:
        for step, value in run:
            values[step].append(value)
    common = {step: found for step, found in values.items() if len(found) == len(runs)}
    if not common:
        raise ValueError(
            f'the {len(runs)} runs of one curve have no step in common: were they trained with '
            'the same settings?'
        )
    return [
        Summary(step, statistics.fmean(found), min(found), max(found))
        if all(map(math.isfinite, found))
        else Summary(step, math.nan, math.nan, math.nan)
        for step, found in sorted(common.items())
    ]


def draw_curves(axes: Axes, curves: Dict[str, List[Run]], xlabel: str, ylabel: str) -> None:
    """Draw each label's mean over its runs, and the range from lowest to highest as a band.

    Args:
        axes: Where to draw.
        curves: Runs of each label.
        xlabel: Unit of the steps.
        ylabel: Name of the value.

    Raises:
        ValueError: If the runs of a label have no step in common.
    """
    for label, runs in curves.items():
        steps, mean, low, high = zip(*summarize(runs))
        name = f'{label} (mean and range of {len(runs)} runs)' if len(runs) > 1 else label
        # Markers where there are few points: a line alone would hide a single one.
        (line,) = axes.plot(steps, mean, marker='o' if len(steps) <= 30 else '', ms=3, label=name)
        if len(runs) > 1:
            axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()


def plot_curves(curves: Dict[str, List[Run]], xlabel: str, ylabel: str, out: Path) -> None:
    """Draw :func:`draw_curves` into ``<out>.png``.

    Args:
        curves: Runs of each label.
        xlabel: Unit of the steps.
        ylabel: Name of the value.
        out: Path without suffix; folders are made.

    Raises:
        ValueError: If the runs of a label have no step in common.
    """
    figure = Figure(figsize=(7, 4.5), layout='constrained')
    draw_curves(figure.subplots(), curves, xlabel, ylabel)
    out = with_suffix(Path(out), '.png')
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


_STEP_KEYS = {'step', 'iter', 'epoch'}


def _is_training(line: dict) -> bool:
    return 'iter' in line


def _read_parts(work_dir: Path) -> List[List[dict]]:
    """Lines of each log of a training, the logs in the order of their timestamps."""
    files = [
        file
        for pattern in ('vis_data/scalars.json', '*/vis_data/scalars.json')
        for file in sorted(work_dir.glob(pattern))
    ]
    if not files:
        raise FileNotFoundError(
            f'{str(work_dir)!r} has no <timestamp>/vis_data/scalars.json: give the work dir of a '
            'training that has logged something'
        )
    return [_read_lines(file) for file in files]


def _read_lines(file: Path) -> List[dict]:
    lines = []
    for number, text in enumerate(file.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
            in_training = line['step'] > 0
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{str(file)!r}: line {number} is no line of a log ({type(error).__name__}: {error}): '
                'remove it'
            ) from error
        if in_training:
            lines.append({key: v for key, v in line.items() if isinstance(v, (int, float))})
    return lines

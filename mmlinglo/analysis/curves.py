# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Scalars that trainings logged, as curves (the paper's Fig. 5)."""

from io import StringIO
from pathlib import Path

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes


def read_log(work_dir: Path) -> pd.DataFrame:
    """Read what mmengine logged over a whole training, of which a resumed one has several parts.

    Lines of step 0 come from validations outside any training and are left out, as is half a line
    at the end, of a training that runs or was killed.

    Args:
        work_dir: Work dir of a training, or one of its timestamp folders.

    Returns:
        A column for each scalar, and ``step`` and ``part``.

    Raises:
        FileNotFoundError: If there is no log, or nothing in it.
        ValueError: If a log is damaged.
    """
    folder, parts = Path(work_dir), []
    files = [*folder.glob('vis_data/scalars.json'), *folder.glob('*/vis_data/scalars.json')]
    for part, file in enumerate(sorted(files)):
        whole = file.read_text(errors='replace').rpartition('\n')[0] or '{"step": 0}'
        try:
            lines = pd.read_json(StringIO(whole), lines=True).assign(part=part)
            if lines.step.isna().any():
                raise ValueError('a line has no step')
            parts.append(lines[lines.step > 0])
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f'{str(file)!r} is no log, or a damaged one: {error}') from error
    if not any(map(len, parts)):
        raise FileNotFoundError(
            f'{str(work_dir)!r} has nothing in <timestamp>/vis_data/scalars.json: give the work dir '
            'of a training that has logged something'
        )
    return pd.concat(filter(len, parts))


def read_scalars(work_dir: Path, key: str) -> pd.DataFrame:
    """Read one scalar of a training's log.

    From the first step that a later part logged, the earlier ones no longer count, since the
    training went on from before it. A name that both training and validation lines have, such as
    ``time``, means the training's.

    Args:
        work_dir: See :func:`read_log`, also for what is raised.
        key: Name of the scalar, such as ``accuracy/top1`` or ``loss``.

    Returns:
        Columns ``step``, ``value``, and ``unit``: what a step counts, ``'epoch'`` or ``'iteration'``.

    Raises:
        ValueError: If no line has ``key``.
    """
    lines = read_log(work_dir)
    if key not in {*lines} - {'part', 'step'}:
        names = ', '.join(sorted({*lines} - {'part', 'step', 'iter', 'epoch'}))
        raise ValueError(f'{str(work_dir)!r} has no scalar {key!r} after step 0; it has: {names}')
    is_training = lines.reindex(columns=['iter']).notna().iter
    by_epoch = 'epoch' in lines and lines.epoch.notna().any()
    of_training = lines[is_training][key].notna().any() or lines[key].isna().all()
    points = lines[is_training == of_training].drop_duplicates(['part', 'step'], keep='last')
    # Of each step what the last part says that logged it or an earlier one.
    starts = points.groupby('part').step.min()
    later = [starts[starts.index > part].min() for part in points.part]
    points = points[~(points.step >= later)].sort_values('step')
    unit = 'epoch' if by_epoch and not of_training else 'iteration'
    return pd.DataFrame(dict(step=points.step, value=points[key].astype(float), unit=unit))


def common_steps(runs: pd.DataFrame) -> pd.DataFrame:
    """The points that all runs of a label have, lest the mean change when a run ends.

    Args:
        runs: Columns ``label``, ``run``, ``step``, ``value``. Where one of a label's runs has diverged, its
            mean is not a number.

    Raises:
        ValueError: If no step is common to all runs of a label.
    """
    steps = runs.groupby(['label', 'step'])
    number = runs.groupby('label').run.transform('nunique')
    found = runs.assign(value=runs.value.mask(steps.value.transform(lambda x: x.isna().any())))
    found = found[steps.run.transform('nunique') == number]
    lost = set(runs.label) - set(found.label)
    if lost:
        raise ValueError(
            f'{min(lost)!r}: the runs of one curve have no step in common: were they trained with '
            'the same settings?'
        )
    return found


def draw_curves(axes: Axes, runs: pd.DataFrame, xlabel: str, ylabel: str) -> None:
    """Draw each label's mean over its runs, and the range from lowest to highest as a band.

    Args:
        axes: Where to draw.
        runs: See :func:`common_steps`.
        xlabel: Unit of the steps.
        ylabel: Name of the value.
    """
    found = common_steps(runs)
    number = found.groupby('label').run.transform('nunique').astype(str)
    several = found.label + ' (mean and range of ' + number + ' runs)'
    found = found.assign(label=found.label.where(number == '1', several))
    # Markers where there are few points: a line alone would hide a single one.
    marker = 'o' if found.step.nunique() <= 30 else None
    style = dict(marker=marker, ms=5, errorbar=('pi', 100))
    sns.lineplot(found, x='step', y='value', hue='label', ax=axes, **style)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.locator_params(axis='x', integer=True)
    axes.grid(alpha=0.3)
    axes.legend(title=None)

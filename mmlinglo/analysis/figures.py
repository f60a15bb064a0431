# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Figures of the analysis tools. Each function draws rows of a report into ``<out>.png``."""

from itertools import product
from pathlib import Path
from typing import Any, Dict, List, Tuple, Union

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

from mmlinglo.analysis.peers import ALL, TASKS
from mmlinglo.analysis.report import save_figure

# Where a label may stand: how far from its point, in typographic points, and on which side; the best first.
DISTANCES = (6, 13, 21)
SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
STATUSES = {'out of memory': 'X', 'too slow': '^', 'crashed': 'P'}  # and the marker of each
QUARTILES = ['latency_lower_ms', 'latency_ms', 'latency_upper_ms']
Rows = List[dict]


def plot_accuracy(rows: Rows, title: str, out: Union[str, Path]) -> None:
    """Draw published accuracy against measured latency: of each backbone its fastest form, eager.

    Args:
        rows: From :func:`~mmlinglo.analysis.benchmark.measure_backbones`.
        title: Title of the figure.
        out: Path without suffix; folders are made.
    """
    table = pd.DataFrame(rows).query("engine == 'eager'").dropna(subset=['latency_ms', 'top1'])
    table = table.sort_values('latency_ms').drop_duplicates('model')
    table = table.assign(label=[ALL[model].label for model in table.model])
    points = table.rename(columns=dict(latency_ms='x', top1='y'))
    axis = dict(xscale='log', xlabel='Latency (Milliseconds per Batch)')
    axis.update(ylabel='Published ImageNet-1K Top-1 Accuracy (%)', title=title)
    _plot_panels([(points, axis)], "LinGlo (the Paper's Claim, Not Reproduced)", out)


def plot_comparison(rows: Rows, out: Union[str, Path]) -> None:
    """Draw the paper's accuracy against the multiply-adds counted, a panel for each task.

    Args:
        rows: From :func:`~mmlinglo.analysis.peers.compare_backbone`; those without either are left out.
        out: Path without suffix; folders are made.
    """
    panels = []
    for name, table in pd.DataFrame(rows).groupby('task', sort=False):
        task = TASKS[name]
        names = {'backbone': 'label', 'deployed_macs_g': 'x', task.columns[1]: 'y'}
        points = table.reindex(columns=list(names)).rename(columns=names).dropna()
        xlabel = 'Multiply-Adds for {} x {} Pixels (Billions)'.format(*task.shape)
        axis = dict(title=task.title, xlabel=xlabel, ylabel=f'{task.accuracy} in the Paper')
        panels.append((points.assign(distilled=False), axis))
    _plot_panels(panels, 'LinGlo, Deployed', out)


def plot_sweep(rows: Rows, title: str, out: Union[str, Path]) -> None:
    """Draw latency and peak memory against the size of the images, a line a model.

    The band of a latency is its quartiles. A marker at the top is the size at which a model went no
    further, such as out of memory (cross) or too slow (triangle; its memory is known).

    Args:
        rows: From :func:`~mmlinglo.analysis.benchmark.measure_backbones`.
        title: Title of the figure.
        out: Path without suffix; folders are made.
    """
    table = pd.DataFrame(rows)
    table['model'] = [ALL[model].label for model in table.model]
    table['form'] = table.form + ', ' + table.engine
    ranks = {model: rank for rank, model in enumerate(table.model.unique())}
    figure = Figure(figsize=(12, 5.5), layout='constrained')
    figure.suptitle(title, fontsize=11)
    names = {'Latency (Milliseconds per Batch)': QUARTILES}
    names['Peak Memory (Mebibytes)'] = ['peak_memory_mib']
    handles: Dict[str, Any] = {}
    for axes, (ylabel, columns) in zip(figure.subplots(1, 2), names.items()):
        points = table.melt(['model', 'form', 'width', 'status'], columns).rename(columns=str.title)
        points['Value'] = points.Value.astype(float)
        how: Dict[str, Any] = dict(x='Width', y='Value', hue='Model', ax=axes)
        band = dict(estimator='median', errorbar=('pi', 100))
        sns.lineplot(points, style='Form', marker='o', **band, **how)
        stopped = points[points.Value.isna()].query('Status != "ok"')
        stopped = stopped.assign(Value=0.97 - 0.045 * stopped.Model.map(ranks))
        place = dict(transform=axes.get_xaxis_transform(), hue_order=list(ranks), s=60)
        if len(stopped):
            sns.scatterplot(stopped, style='Status', markers=STATUSES, **place, **how)
        axes.set(xscale='log', xlabel='Image Height and Width (Pixels)', ylabel=ylabel)
        if points.Value.notna().any():
            axes.set_yscale('log')
            low, high = axes.get_ylim()
            axes.set_ylim(low, high * (high / low) ** (0.05 * len(ranks)))  # room for markers
            _plain_log_axis(axes.yaxis)
        axes.set_xticks(table.width.unique(), table.width.unique())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
        axes.get_legend().remove()
        handles.update(zip(*reversed(axes.get_legend_handles_labels())))
    figure.legend(handles.values(), handles, loc='outside lower center', ncols=4, fontsize=9)
    save_figure(figure, out)


def plot_complexity(rows: Rows, title: str, out: Union[str, Path]) -> None:
    """Draw multiply-adds as bars: a line for each part and form, a colour for each operator.

    Args:
        rows: From :func:`~mmlinglo.analysis.complexity.complexity_rows`.
        title: Title of the figure.
        out: Path without suffix; folders are made.
    """
    table = pd.DataFrame(rows).query("operator != 'all' and part != 'total'")
    table = table.pivot_table('macs_g', ['part', 'form'], 'operator', sort=False).iloc[::-1]
    figure = Figure(figsize=(9, 1.8 + 0.35 * len(table)), layout='constrained')
    axes = figure.subplots()
    table.plot.barh(stacked=True, ax=axes, title=title, legend=False)
    for y, total in enumerate(table.sum(axis=1)):
        axes.annotate(f'{total:.3g}', (total, y), (4, 0), textcoords='offset points', va='center')
    names = [f'{part}, {form}'.replace('_', ' ').title() for part, form in table.index]
    axes.set(xlabel='Multiply-Adds (Billions)', ylabel='', yticklabels=names)
    axes.margins(x=0.12)
    figure.legend(loc='outside lower center', ncols=4)
    save_figure(figure, out)


def _plot_panels(
    panels: List[Tuple[pd.DataFrame, Dict[str, Any]]], ours: str, out: Union[str, Path]
) -> None:
    """Draw points with columns label, x, y, distilled: LinGlo's joined by a line, the others without."""
    figure = Figure(figsize=(2.5 + 6.5 * len(panels), 6), layout='constrained')
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    others, teacher = 'Others', 'Others, Trained with a Teacher'
    for axes, (points, axis) in zip(grid, panels):
        is_ours = points.label.astype(str).str.startswith('LinGlo')
        kinds = np.select([is_ours, points.distilled.astype(bool)], [ours, teacher], others)
        for kind, mine in points.sort_values('x').groupby(pd.Series(kinds, points.index)):
            marker, color, size = ('o-', 'tab:red', 8) if kind == ours else ('s', 'tab:gray', 6)
            fill = 'none' if kind == teacher else 'full'
            axes.plot(mine.x, mine.y, marker, color=color, ms=size, fillstyle=fill, label=kind)
        axes.margins(x=0.2, y=0.1)
        axes.grid(alpha=0.3)
        axes.set(**axis)
        if axes.get_xscale() == 'log':
            _plain_log_axis(axes.xaxis)
        if len(points):
            axes.legend(loc='lower right')
        else:
            axes.text(0.5, 0.5, 'No Data', transform=axes.transAxes, ha='center')
    for axes, (points, _) in zip(grid, panels):
        _label_points(axes, points)
    save_figure(figure, out)


def _label_points(axes: Axes, points: pd.DataFrame) -> None:
    """Write each label beside its point, on a side where it covers neither points nor labels."""
    axes.figure.draw_without_rendering()  # lays it out: sizes in pixels are known from here on
    pixels = axes.figure.dpi / 72  # of a typographic point
    inside, legend = axes.get_window_extent(), axes.get_legend()
    taken = [] if legend is None else [legend.get_window_extent()]
    centres = axes.transData.transform(points[['x', 'y']])
    taken += [Bbox.from_bounds(x, y, 0, 0).padded(5 * pixels) for x, y in centres]
    lines = []
    for line in (line for line in axes.get_lines() if line.get_linestyle() == '-'):
        path = line.get_transform().transform_path(line.get_path()).interpolated(50)
        lines += [Bbox.from_bounds(x, y, 1, 1) for x, y in np.asarray(path.vertices)]
    for label, x, y in points.sort_values('y', ascending=False)[['label', 'x', 'y']].values:
        arrow = dict(arrowstyle='-', color='tab:gray', lw=0.7, shrinkA=0, shrinkB=4)
        style: Dict[str, Any] = dict(ha='center', va='center', textcoords='offset points')
        text = axes.annotate(label, (x, y), (0, 0), size='small', arrowprops=arrow, **style)
        text.get_window_extent()  # puts it in its place
        # Of the text without the line; a little larger, so that two labels do not read as one.
        box = Text.get_window_extent(text).padded(pixels)
        places: List[tuple] = []
        for distance, side in product(DISTANCES, SIDES):
            offset = np.array(side) * (distance + box.size / 2 / pixels)
            moved = box.translated(*(offset * pixels))
            outside = not (inside.contains(*moved.min) and inside.contains(*moved.max))
            cost = 10.0 * (moved.count_overlaps(taken) + outside)
            cost += 2 * (moved.count_overlaps(lines) > 0) + distance / 4
            places.append((cost, len(places), distance, tuple(offset), moved))
        _, _, distance, text.xyann, moved = min(places)
        text.arrow_patch.set_visible(distance > DISTANCES[0])
        taken.append(moved)


def _plain_log_axis(axis: Axis) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter('{x:g}'))
    axis.set_minor_formatter(NullFormatter())

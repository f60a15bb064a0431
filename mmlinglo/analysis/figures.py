# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Figures of the analysis tools. Each function draws rows of a report into ``<out>.png``."""

from itertools import product
from pathlib import Path
from typing import Any, Dict, List, Union

import numpy as np
import pandas as pd
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
STATUSES = {'out of memory': 'x', 'too slow': '^', 'crashed': '+'}  # and the marker of each
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
    figure = Figure(figsize=(9, 6), layout='constrained')
    axes = figure.subplots()
    figure.suptitle(title, fontsize=11)
    points = table.rename(columns=dict(latency_ms='x', top1='y'))
    _draw_points(axes, points, "LinGlo (the Paper's Claim, Not Reproduced)")
    axes.set_xscale('log')
    _plain_log_axis(axes.xaxis)
    axes.set_xlabel('Latency (Milliseconds per Batch)')
    axes.set_ylabel('Published ImageNet-1K Top-1 Accuracy (%)')
    _label_points(axes, points)
    save_figure(figure, out)


def plot_comparison(rows: Rows, out: Union[str, Path]) -> None:
    """Draw the paper's accuracy against the multiply-adds counted, a panel for each task.

    Args:
        rows: From :func:`~mmlinglo.analysis.peers.compare_backbone`; those without either are left out.
        out: Path without suffix; folders are made.
    """
    by_task = pd.DataFrame(rows).groupby('task', sort=False)
    figure = Figure(figsize=(6.5 * len(by_task), 6), layout='constrained')
    panels = figure.subplots(1, len(by_task), squeeze=False)[0]
    drawn = []
    for axes, (name, table) in zip(panels, by_task):
        task = TASKS[name]
        names = {'backbone': 'label', 'deployed_macs_g': 'x', task.columns[1]: 'y'}
        points = table.reindex(columns=list(names)).rename(columns=names).dropna()
        drawn.append(points.assign(distilled=False))
        _draw_points(axes, drawn[-1], 'LinGlo, Deployed')
        axes.set_title(task.title)
        axes.set_xlabel('Multiply-Adds for {} x {} Pixels (Billions)'.format(*task.shape))
        axes.set_ylabel(f'{task.accuracy} in the Paper')
    for axes, points in zip(panels, drawn):
        _label_points(axes, points)
    save_figure(figure, out)


def plot_sweep(rows: Rows, title: str, out: Union[str, Path]) -> None:
    """Draw latency and peak memory against the size of the images, a line a model.

    The band of a latency is its quartiles. A marker at the top is the size at which a model went no
    further, such as out of memory (cross) or too slow (triangle; its memory is known).

    Args:
        rows: From :func:`~mmlinglo.analysis.benchmark.measure_backbones`.
        title: Title of the figure.
        out: Path without suffix; folders are made.
    """
    numbers = ['latency_ms', 'latency_lower_ms', 'latency_upper_ms', 'peak_memory_mib']
    table = pd.DataFrame(rows).astype(dict.fromkeys(numbers, float))
    widths, models = sorted(set(table.width)), table.groupby('model', sort=False)
    figure = Figure(figsize=(12, 5.5), layout='constrained')
    figure.suptitle(title, fontsize=11)
    ylabels = ('Latency (Milliseconds per Batch)', 'Peak Memory (Mebibytes)')
    handles: Dict[str, Any] = {}
    for axes, key, ylabel in zip(figure.subplots(1, 2), ('latency_ms', 'peak_memory_mib'), ylabels):
        for number, (model, mine) in enumerate(models):
            label, color = ALL[model].label, f'C{number}'
            mine.plot('width', key, ax=axes, color=color, label=label, marker='osDvP*'[number % 6])
            if key == 'latency_ms':
                band = mine.latency_lower_ms, mine.latency_upper_ms
                axes.fill_between(mine.width, *band, color=color, alpha=0.25, lw=0)
            for row in mine[mine[key].isna()].itertuples():
                top, name = 0.97 - 0.045 * number, f'{label}: {row.status.title()}'
                place: Dict[str, Any] = dict(transform=axes.get_xaxis_transform(), mew=2, ls='')
                axes.plot(row.width, top, STATUSES[row.status], color=color, label=name, **place)
        axes.set_xscale('log')
        if table[key].notna().any():
            axes.set_yscale('log')
            low, high = axes.get_ylim()
            axes.set_ylim(low, high * (high / low) ** (0.05 * len(models)))  # room for markers
            _plain_log_axis(axes.yaxis)
        axes.set_xticks(widths, widths)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel='Image Height and Width (Pixels)', ylabel=ylabel)
        axes.grid(alpha=0.3)
        axes.get_legend().remove()
        handles.update(zip(*reversed(axes.get_legend_handles_labels())))
    figure.legend(handles.values(), handles, loc='outside lower center', ncols=3, fontsize=9)
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


def _draw_points(axes: Axes, points: pd.DataFrame, ours: str) -> None:
    """Draw points with columns label, x, y, distilled: LinGlo's joined by a line, the others without."""
    is_ours, distilled = (
        points.label.astype(str).str.startswith('LinGlo'),
        points.distilled.astype(bool),
    )
    teacher = 'Others, Trained with a Teacher'
    for chosen, label, marker, style in (
        (is_ours, ours, 'o-', dict(color='tab:red', ms=8)),
        (~is_ours & ~distilled, 'Others', 's', dict(color='tab:gray')),
        (~is_ours & distilled, teacher, 's', dict(color='tab:gray', fillstyle='none')),
    ):
        mine = points[chosen].sort_values('x')
        if len(mine):
            axes.plot(mine.x, mine.y, marker, label=label, **style)
    axes.margins(x=0.2, y=0.1)
    axes.grid(alpha=0.3)
    if len(points):
        axes.legend(loc='lower right')
    else:
        axes.text(0.5, 0.5, 'No Data', transform=axes.transAxes, ha='center')


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

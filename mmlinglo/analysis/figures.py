# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Figures of the analysis tools. Each function draws rows of a report into ``<out>.png``."""

from pathlib import Path
from typing import Any, Dict, List, Union

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

from mmlinglo.analysis.peers import ALL, TASKS
from mmlinglo.analysis.report import save_figure

# Where a label may stand beside its point, the best first: steps to the right and upwards, and points a step.
PLACES = [
    (x * distance, y * distance)
    for distance in (7, 14, 22)
    for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
]
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
    points = [
        (ALL[row.model].label, row.latency_ms, row.top1, row.distilled)
        for row in table.itertuples()
    ]
    figure = Figure(figsize=(9, 6), layout='constrained')
    axes = figure.subplots()
    figure.suptitle(title, fontsize=11)
    axes.set_xscale('log')
    _draw_points(axes, points, "LinGlo (the Paper's Claim, Not Reproduced)")
    _plain_log_axis(axes.xaxis)
    axes.set_xlabel('Latency (Milliseconds per Batch)')
    axes.set_ylabel('Published ImageNet-1K Top-1 Accuracy (%)')
    _label_points(axes, points)
    save_figure(figure, out)


def plot_comparison(rows: Rows, out: Union[str, Path]) -> None:
    """Draw the paper's accuracy against the multiply-adds counted, a panel for each task.

    Args:
        rows: From :func:`~mmlinglo.analysis.peers.comparison_row`; those without either are left out.
        out: Path without suffix; folders are made.
    """
    tasks = list(dict.fromkeys(row['task'] for row in rows))
    figure = Figure(figsize=(6.5 * len(tasks), 6), layout='constrained')
    panels = list(zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks))
    found = {}
    for axes, name in panels:
        task = TASKS[name]
        key, heading = task.accuracy
        points = found[name] = [
            (row['backbone'], row['deployed_macs_g'], row[key], False)
            for row in rows
            if row['task'] == name and 'deployed_macs_g' in row and key in row
        ]
        _draw_points(axes, points, 'LinGlo, Deployed')
        axes.set_title(task.title)
        axes.set_xlabel('Multiply-Adds for {} x {} Pixels (Billions)'.format(*task.shape))
        axes.set_ylabel(f'{heading} in the Paper')
    for axes, name in panels:
        _label_points(axes, found[name])
    save_figure(figure, out)


def plot_sweep(rows: Rows, title: str, out: Union[str, Path]) -> None:
    """Draw latency and peak memory against the size of the images, a line a model.

    The band of a latency is its quartiles. A marker at the top is the size at which a model went no
    further, such as out of memory (cross) or too slow (triangle; its memory is known).

    Args:
        rows: From :func:`~mmlinglo.analysis.benchmark.sweep`.
        title: Title of the figure.
        out: Path without suffix; folders are made.
    """
    table = pd.DataFrame(rows)
    figure = Figure(figsize=(12, 5.5), layout='constrained')
    figure.suptitle(title, fontsize=11)
    panels = {
        'latency_ms': 'Latency (Milliseconds per Batch)',
        'peak_memory_mib': 'Peak Memory (Mebibytes)',
    }
    handles: Dict[str, Any] = {}
    for axes, (key, ylabel) in zip(figure.subplots(1, 2), panels.items()):
        models = table.groupby('model', sort=False)
        for number, (model, mine) in enumerate(models):
            label, color = ALL[model].label, f'C{number}'
            known = mine.dropna(subset=[key])
            if len(known):
                style = dict(marker='osDvP*'[number % 6], ms=5, color=color, label=label)
                axes.plot(known.width, known[key], **style)
            if key == 'latency_ms':
                band = known[['latency_lower_ms', 'latency_upper_ms']].astype(float)
                axes.fill_between(known.width, *band.T.values, color=color, alpha=0.25, lw=0)
            for row in mine[mine[key].isna()].itertuples():
                place = (row.width, 0.97 - 0.045 * number)
                style = dict(color=color, mew=2, label=f'{label}: {row.status.title()}')
                top = axes.get_xaxis_transform()
                axes.plot(*place, STATUSES[row.status], transform=top, **style)
        axes.set_xscale('log')
        if table[key].notna().any():
            axes.set_yscale('log')
            low, high = axes.get_ylim()
            axes.set_ylim(low, high * (high / low) ** (0.05 * len(models)))  # room for markers
            _plain_log_axis(axes.yaxis)
        axes.set_xticks(sorted(set(table.width)))
        axes.xaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel('Image Height and Width (Pixels)')
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.3)
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


def _draw_points(axes: Axes, points: List[tuple], ours: str) -> None:
    """Points (label, x, y, whether distilled): LinGlo's joined by a line, the others by themselves."""
    linglo = sorted((x, y) for label, x, y, _ in points if label.startswith('LinGlo'))
    if linglo:
        axes.plot(*zip(*linglo), 'o-', ms=8, color='tab:red', label=ours)
    for distilled, name in ((False, 'Others'), (True, 'Others, Trained with a Teacher')):
        others = [
            (x, y) for label, x, y, kind in points if kind == distilled and 'LinGlo' not in label
        ]
        if others:
            style = dict(fillstyle='none' if distilled else 'full', color='tab:gray', label=name)
            axes.plot(*zip(*others), 's', **style)
    axes.margins(x=0.2, y=0.1)
    axes.grid(alpha=0.3)
    if points:
        axes.legend(loc='lower right')
    else:
        axes.text(0.5, 0.5, 'No Data', transform=axes.transAxes, ha='center')


def _label_points(axes: Axes, points: List[tuple]) -> None:
    """Write each label beside its point, on a side where it covers neither points nor labels."""
    figure = axes.figure
    figure.draw_without_rendering()  # lays it out: sizes in pixels are known from here on
    centres = axes.transData.transform([point[1:3] for point in points]) if points else []
    size = 5 * figure.dpi / 72  # half a marker, in pixels
    taken = [Bbox.from_extents(x - size, y - size, x + size, y + size) for x, y in centres]
    lines = []  # points of them
    for line in axes.get_lines():
        if line.get_linestyle() == '-':
            path = line.get_transform().transform_path(line.get_path()).interpolated(50)
            lines += [Bbox.from_bounds(x, y, 1, 1) for x, y in path.vertices]
    inside = axes.get_window_extent()
    if axes.get_legend() is not None:
        taken.append(axes.get_legend().get_window_extent())
    for label, *point, _ in sorted(points, key=lambda point: -point[2]):
        found = []
        for x, y in PLACES:
            far = max(abs(x), abs(y)) > 7  # gets a line to its point
            text = axes.annotate(
                label,
                point,
                (x, y),
                textcoords='offset points',
                ha={1: 'left', 0: 'center', -1: 'right'}[(x > 0) - (x < 0)],
                va={1: 'bottom', 0: 'center', -1: 'top'}[(y > 0) - (y < 0)],
                fontsize='small',
                arrowprops=dict(
                    arrowstyle='-', color='tab:gray', lw=0.7 * far, shrinkA=0, shrinkB=4
                ),
            )
            text.get_window_extent()  # puts it in its place
            # Of the text without the line; a little larger, so that two labels do not read as one.
            box = Text.get_window_extent(text).padded(size / 5)
            outside = not (inside.contains(*box.min) and inside.contains(*box.max))
            cost = 10 * (box.count_overlaps(taken) + outside)
            cost += 2 * (box.count_overlaps(lines) > 0) + max(abs(x), abs(y)) / 4
            found.append((cost, len(found), text, box))
        (_, _, _, box), *others = sorted(found, key=lambda place: place[:2])
        for *_, text, _ in others:
            text.remove()
        taken.append(box)


def _plain_log_axis(axis: Any) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter('{x:g}'))
    axis.set_minor_formatter(NullFormatter())

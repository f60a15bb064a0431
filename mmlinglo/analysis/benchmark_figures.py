# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Figures of the benchmark: accuracy against latency, and latency and memory by size."""

from pathlib import Path
from typing import Any, Dict, List, Tuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

from mmlinglo.analysis.backbones import BACKBONES
from mmlinglo.analysis.report import with_suffix

SIDES = (  # offset in points, and the alignment of a label there
    ((7, 0), 'left', 'center'),
    ((-7, 0), 'right', 'center'),
    ((0, 7), 'center', 'bottom'),
    ((0, -7), 'center', 'top'),
    ((6, 6), 'left', 'bottom'),
    ((6, -6), 'left', 'top'),
    ((-6, 6), 'right', 'bottom'),
    ((-6, -6), 'right', 'top'),
)
STATUSES = {'out of memory': 'x', 'too slow': '^', 'crashed': '+'}  # and the marker of each


def plot_accuracy(rows: List[dict], title: str, out: Path) -> None:
    """Draw published accuracy against measured latency into ``<out>.png``.

    One point a backbone with both: its fastest form, eager. Filled markers are
    trained without a teacher, hollow ones with one.

    Args:
        rows: From :func:`~mmlinglo.analysis.benchmark.measure_backbones`.
        title: Title of the figure.
        out: Path without suffix; folders are made.
    """
    points: Dict[str, dict] = {}
    for row in rows:
        if row['engine'] == 'eager' and None not in (row['latency_ms'], row['top1']):
            best = points.setdefault(row['model'], row)
            if row['latency_ms'] < best['latency_ms']:
                points[row['model']] = row
    figure = Figure(figsize=(9, 6), layout='constrained')
    axes = figure.subplots()
    figure.suptitle(title, fontsize=11)
    ours = [row for row in points.values() if BACKBONES[row['model']].linglo is not None]
    if ours:
        claim = "LinGlo (the paper's claim, not reproduced)"
        xs, ys = zip(*sorted((row['latency_ms'], row['top1']) for row in ours))
        axes.plot(xs, ys, 'o-', ms=8, color='tab:red', label=claim)
    for distilled, label in ((False, 'others'), (True, 'others, trained with a teacher')):
        others = [
            row for row in points.values() if row not in ours and row['distilled'] == distilled
        ]
        if others:
            axes.plot(
                [row['latency_ms'] for row in others],
                [row['top1'] for row in others],
                's',
                color='tab:gray',
                fillstyle='none' if distilled else 'full',
                label=label,
            )
    axes.set_xscale('log')
    _plain_log_axis(axes.xaxis)
    axes.margins(x=0.2, y=0.1)
    axes.set_xlabel('Latency [ms a batch]')
    axes.set_ylabel('Published ImageNet-1K top-1 accuracy [%]')
    axes.grid(alpha=0.3)
    if points:
        axes.legend(loc='lower right')
    else:
        axes.text(0.5, 0.5, 'no data', transform=axes.transAxes, ha='center')
    _label_points(
        axes,
        {
            BACKBONES[model].label: (row['latency_ms'], row['top1'])
            for model, row in sorted(points.items(), key=lambda item: -item[1]['top1'])
        },
    )
    _save(figure, out)


def plot_sweep(rows: List[dict], title: str, out: Path) -> None:
    """Draw latency and peak memory against the size of the images into ``<out>.png``.

    A line a model; the band of a latency is its quartiles. A marker at the top is the
    size at which a model went no further, such as out of memory (cross) or too slow
    (triangle; its memory is known).

    Args:
        rows: From :func:`~mmlinglo.analysis.benchmark.sweep`.
        title: Title of the figure.
        out: Path without suffix; folders are made.
    """
    models = list(dict.fromkeys(row['model'] for row in rows))
    figure = Figure(figsize=(12, 5.5), layout='constrained')
    figure.suptitle(title, fontsize=11)
    panels = {'latency_ms': 'Latency [ms a batch]', 'peak_memory_mib': 'Peak memory [MiB]'}
    handles: Dict[str, Any] = {}
    for axes, (key, ylabel) in zip(figure.subplots(1, 2), panels.items()):
        for number, model in enumerate(models):
            mine = [row for row in rows if row['model'] == model]
            _draw_line(axes, mine, key, BACKBONES[model].label, f'C{number}', number)
        axes.set_xscale('log')
        if any(row[key] is not None for row in rows):
            axes.set_yscale('log')
            low, high = axes.get_ylim()
            axes.set_ylim(low, high * (high / low) ** (0.05 * len(models)))  # room for markers
            _plain_log_axis(axes.yaxis)
        axes.set_xticks(sorted({row['width'] for row in rows}))
        axes.xaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel('Size of the images [pixels, height = width]')
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.3)
        handles.update(zip(*reversed(axes.get_legend_handles_labels())))
    figure.legend(handles.values(), handles, loc='outside lower center', ncols=3, fontsize=9)
    _save(figure, out)


def _draw_line(axes: Axes, rows: List[dict], key: str, label: str, color: str, number: int) -> None:
    found = [row for row in rows if row[key] is not None]
    sizes = [row['width'] for row in found]
    if found:
        marker = 'osDvP*'[number % 6]
        values = [row[key] for row in found]
        axes.plot(sizes, values, '-', marker=marker, ms=5, color=color, label=label)
    if found and key == 'latency_ms':
        quartiles = zip(*((row['latency_lower_ms'], row['latency_upper_ms']) for row in found))
        axes.fill_between(sizes, *quartiles, color=color, alpha=0.25, linewidth=0)
    for row in rows:
        if row[key] is None:
            axes.plot(
                row['width'],
                0.97 - 0.045 * number,
                STATUSES[row['status']],
                color=color,
                mew=2,
                label=f'{label}: {row["status"]}',
                transform=axes.get_xaxis_transform(),
            )


def _label_points(axes: Axes, points: Dict[str, Tuple[float, float]]) -> None:
    """Write each label beside its point, on a side where it covers neither points nor labels."""
    figure = axes.figure
    figure.draw_without_rendering()  # lays it out: sizes in pixels are known from here on
    centres = axes.transData.transform(list(points.values())) if points else []
    size = 5 * figure.dpi / 72  # half a marker, in pixels
    taken = [Bbox.from_extents(x - size, y - size, x + size, y + size) for x, y in centres]
    if axes.get_legend() is not None:
        taken.append(axes.get_legend().get_window_extent())
    for label, point in points.items():
        for offset, side, height in SIDES:
            text = axes.annotate(
                label,
                point,
                offset,
                textcoords='offset points',
                ha=side,
                va=height,
                fontsize='small',
                bbox=dict(facecolor='white', edgecolor='none', alpha=0.7, pad=0.5),
            )
            box = text.get_window_extent()
            if not box.count_overlaps(taken) or offset == SIDES[-1][0]:
                break
            text.remove()
        taken.append(box)


def _plain_log_axis(axis: Any) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter('{x:g}'))
    axis.set_minor_formatter(NullFormatter())


def _save(figure: Figure, out: Path) -> None:
    out = with_suffix(Path(out), '.png')
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)

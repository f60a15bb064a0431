# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Figures of the benchmark: accuracy against latency, and latency and memory by size."""

from pathlib import Path
from typing import Any, Dict, List

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from mmlinglo.analysis.backbones import BACKBONES
from mmlinglo.analysis.report import with_suffix

STATUSES = {'out of memory': 'x', 'too slow': '^'}  # and the marker of each


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
    for row in points.values():
        axes.annotate(
            BACKBONES[row['model']].label,
            (row['latency_ms'], row['top1']),
            (7, -3),
            textcoords='offset points',
            fontsize='small',
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
    _save(figure, out)


def plot_sweep(rows: List[dict], title: str, out: Path) -> None:
    """Draw latency and peak memory against the size of the images into ``<out>.png``.

    A line a model; the band of a latency is its quartiles. A marker at the top is the
    size at which a model was out of memory (cross) or too slow (triangle).

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
        axes.set_yscale('log')
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** (0.05 * len(models)))  # no line meets a marker
        _plain_log_axis(axes.yaxis)
        axes.set_xticks(sorted({row['width'] for row in rows}))
        axes.xaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel('Size of the images [pixels, height = width]')
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.3)
        handles.update(zip(*reversed(axes.get_legend_handles_labels())))
    figure.legend(handles.values(), handles, loc='outside lower center', ncols=3, fontsize=9)
    _save(figure, out)


def _draw_line(axes: Axes, rows: List[dict], key: str, label: str, color: str, number: int) -> None:
    found = [row for row in rows if row[key] is not None and row['status'] == 'ok']
    sizes = [row['width'] for row in found]
    if found:
        axes.plot(sizes, [row[key] for row in found], 'o-', ms=4, color=color, label=label)
    if found and key == 'latency_ms':
        quartiles = zip(*((row['latency_lower_ms'], row['latency_upper_ms']) for row in found))
        axes.fill_between(sizes, *quartiles, color=color, alpha=0.25, linewidth=0)
    for row in rows:
        if row['status'] in STATUSES:
            axes.plot(
                row['width'],
                0.97 - 0.045 * number,
                STATUSES[row['status']],
                color=color,
                mew=2,
                label=f'{label}: {row["status"]}',
                transform=axes.get_xaxis_transform(),
            )


def _plain_log_axis(axis: Any) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter('{x:g}'))
    axis.set_minor_formatter(NullFormatter())


def _save(figure: Figure, out: Path) -> None:
    out = with_suffix(Path(out), '.png')
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Latency and memory of key-only and dot-product attention by input size (the paper's Fig. 4)."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, ContextManager, Dict, List, Optional, Sequence, Union

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmlinglo import LinGlo
from mmlinglo.analysis.execution import Execution, result_or_out_of_memory
from mmlinglo.analysis.memory import peak_memory_mib
from mmlinglo.analysis.report import with_suffix
from mmlinglo.analysis.timing import Timing, measure

ATTENTIONS = {
    'key_only': 'key-only',
    'dot_product': 'dot-product, fused kernel',
    'dot_product_materialised': 'dot-product, N x N matrix in memory',
}
"""What is compared, and how it is called in tables and figures.

PyTorch's ``scaled_dot_product_attention`` works in blocks and never has the N x N
matrix of all pairs in memory, as the implementations of 2022 had and the paper's
memory curve shows. ``dot_product`` takes the kernel that PyTorch chooses,
``dot_product_materialised`` the one with the matrix.
"""
MIN_SIZE = 64  # pixels; at 32 the last map is one position, too little for a training's batch norms


@dataclass(frozen=True)
class Setting(Execution):
    """What the points of a figure have in common.

    Args:
        arch: ``arch`` of :class:`~mmlinglo.LinGlo`. The others are
            :class:`~mmlinglo.analysis.execution.Execution`'s.
    """

    arch: Union[str, dict] = 'b0'


def build_step(attention: str, size: int, setting: Setting) -> Callable[[], None]:
    """Build a backbone as for classification (last map only), images, and the step on both.

    Args:
        attention: A key of :data:`ATTENTIONS`.
        size: Height and width of the images in pixels.
        setting: See :class:`Setting`.

    Raises:
        ValueError: If ``attention`` is unknown.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f'attention must be one of {list(ATTENTIONS)}, got {attention!r}')
    kind = 'key_only' if attention == 'key_only' else 'dot_product'
    model = LinGlo(setting.arch, out_indices=-1, attention=kind)
    if not setting.train_step:
        model.eval().switch_to_deploy()
    model.to(setting.device, setting.dtype)
    images = torch.randn(
        setting.batch_size, 3, size, size, device=setting.device, dtype=setting.dtype
    )

    def kernel() -> ContextManager:
        materialised = attention == 'dot_product_materialised'
        return sdpa_kernel(SDPBackend.MATH) if materialised else nullcontext()

    @torch.no_grad()
    def infer() -> None:
        with kernel():
            model(images)

    def train() -> None:
        model.zero_grad()
        with kernel():
            model(images)[0].sum().backward()

    return train if setting.train_step else infer


def measure_size(
    size: int,
    setting: Setting,
    attentions: Sequence[str] = tuple(ATTENTIONS),
    rounds: int = 5,
    limit_gib: Optional[float] = None,
) -> List[dict]:
    """Measure all attentions at one input size.

    The memory of each is measured in a process of its own, see
    :func:`~mmlinglo.analysis.memory.peak_memory_mib`. Those that fit are then timed
    together, in interleaved rounds, in one further process.

    Args:
        size: Height and width of the images in pixels.
        setting: See :class:`Setting`.
        attentions: Keys of :data:`ATTENTIONS`.
        rounds: Rounds of timing, at least 2.
        limit_gib: Memory in GiB that one may take; None for what there is.

    Returns:
        One row an attention: ``size``, ``attention``, ``status`` (``'ok'`` or
        ``'out of memory'``), ``latency_ms`` a batch (median) with its quartiles
        ``latency_lower_ms`` and ``latency_upper_ms``, and ``peak_memory_mib``; None
        where it was out of memory. (A row with only the memory ran out of it while
        several attentions were timed together.)

    Raises:
        ValueError: If ``size``, ``rounds`` or ``limit_gib`` is too small.
        RuntimeError: If a measurement fails for another reason than memory.
    """
    if size < MIN_SIZE:
        raise ValueError(f'sizes must be at least {MIN_SIZE} pixels, got {size}')
    if rounds < 2:
        raise ValueError(f'rounds must be at least 2, got {rounds}')
    if limit_gib is not None and not limit_gib > 0:
        raise ValueError(f'the memory limit must be above 0 GiB, got {limit_gib}')
    memory = {
        name: result_or_out_of_memory(
            _peak_memory, name, size, setting, limit_gib, limited=limit_gib is not None
        )
        for name in attentions
    }
    fitting = [name for name in attentions if memory[name] is not None]
    timings = result_or_out_of_memory(_timings, fitting, size, setting, rounds) or {}
    return [
        dict(
            size=size,
            attention=name,
            status='ok' if name in timings else 'out of memory',
            latency_ms=1e3 * timings[name].median if name in timings else None,
            latency_lower_ms=1e3 * timings[name].lower if name in timings else None,
            latency_upper_ms=1e3 * timings[name].upper if name in timings else None,
            peak_memory_mib=memory[name],
        )
        for name in attentions
    ]


def plot_scaling(rows: List[dict], title: str, out: Path) -> None:
    """Draw latency and peak memory against the input size into ``<out>.png``.

    The band of a latency is its quartiles. A cross at the top of a panel is a size at
    which an attention was out of memory.

    Args:
        rows: From :func:`measure_size`.
        title: Title of the figure.
        out: Path without suffix; folders are made.
    """
    figure = Figure(figsize=(11, 5), layout='constrained')
    figure.suptitle(title, fontsize=11)
    panels = {'latency_ms': 'Latency [ms a batch]', 'peak_memory_mib': 'Peak memory [MiB]'}
    handles: Dict[str, object] = {}
    for axes, (key, ylabel) in zip(figure.subplots(1, 2), panels.items()):
        axes.set_yscale('log')
        strips = 0
        for (attention, label), style, marker, color in zip(
            ATTENTIONS.items(), ('-', '--', ':'), 'os^', ('C0', 'C1', 'C2')
        ):
            mine = [row for row in rows if row['attention'] == attention]
            found = [row for row in mine if row[key] is not None]
            missing = [row['size'] for row in mine if row[key] is None]
            found_sizes = [row['size'] for row in found]
            if found:
                values = [row[key] for row in found]
                axes.plot(found_sizes, values, style, marker=marker, ms=5, color=color, label=label)
            if found and key == 'latency_ms':
                quartiles = zip(
                    *((row['latency_lower_ms'], row['latency_upper_ms']) for row in found)
                )
                axes.fill_between(found_sizes, *quartiles, color=color, alpha=0.25, linewidth=0)
            if missing:
                axes.plot(
                    missing,
                    [0.97 - 0.05 * strips] * len(missing),
                    'x',
                    color=color,
                    mew=2,
                    label=f'{label}: out of memory',
                    transform=axes.get_xaxis_transform(),
                )
                strips += 1
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** (0.07 * strips))  # no curve meets a cross
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(sorted({row['size'] for row in rows}))
        axes.set_xlabel('Input size [pixels, height = width]')
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.3)
        handles.update(zip(*reversed(axes.get_legend_handles_labels())))
    figure.legend(handles.values(), handles, loc='outside lower center', ncols=3, fontsize=9)
    out = with_suffix(Path(out), '.png')
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


def _peak_memory(attention: str, size: int, setting: Setting, limit_gib: Optional[float]) -> float:
    setting.prepare_process()
    build_step(attention, MIN_SIZE, setting)()
    build = partial(build_step, attention, size, setting)
    return peak_memory_mib(build, setting.device, limit_gib)


def _timings(attentions: List[str], size: int, setting: Setting, rounds: int) -> Dict[str, Timing]:
    setting.prepare_process()
    steps = {name: build_step(name, size, setting) for name in attentions}
    return measure(steps, setting.device, rounds, warmup=1)

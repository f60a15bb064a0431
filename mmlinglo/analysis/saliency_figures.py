# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Sheets of the weights that key-only attention gives to the positions of a picture."""

from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Union

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from mmlinglo.utils.files import complete_file

from .saliency import SaliencyMaps

DPI = 120
# Where the colours may end: at the first that is not below any weight on the sheet.
LIMITS = (1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 4.0, 9.0, 16.0, 36.0, 64.0)
# Lengths on the sheet in inches.
CELL = 1.4  # width of a map
GAP = 0.08
MARGIN = 0.4
HEADER = 1.1
HEADING = 0.5
CAPTION = 0.17  # below a map
MIN_WIDTH = 8.0


class Panel(NamedTuple):
    """A stage on a sheet; ``rows`` has (columns, H, W) weights over their mean for each label."""

    heading: str
    columns: List[str]
    rows: Dict[str, Tensor]


def plot_saliency(
    maps: SaliencyMaps,
    out: Union[str, Path],
    title: str,
    stages: Optional[Sequence[int]] = None,
    blocks: Optional[Sequence[int]] = None,
    mean_heads: bool = False,
) -> None:
    """Draw the weights over the picture: a panel a stage with a row a block and a column a head.

    Colours show a position's weight over the mean weight of its head, which is 1 / N
    with N positions. All maps of a sheet share one logarithmic scale.

    Args:
        maps: What :func:`~mmlinglo.analysis.saliency_maps` returned.
        out: PNG file to write; its folder is made.
        title: First line of the sheet.
        stages: Numbers of the stages to draw, from 0; None for all.
        blocks: Numbers of their blocks to draw, from 0; None for all.
        mean_heads: Whether to draw only the mean over the heads of each block,
            with a column a block.

    Raises:
        ValueError: If there is no such stage, or none of the stages has such a block.
    """
    chosen: Dict[int, List[int]] = {}
    for stage, block in maps.weights:
        if (stages is None or stage in stages) and (blocks is None or block in blocks):
            chosen.setdefault(stage, []).append(block)
    known = {stage for stage, _ in maps.weights}
    found = {block for numbers in chosen.values() for block in numbers}
    if not chosen or not set(stages or ()) <= known or not set(blocks or ()) <= found:
        raise ValueError(
            f'stages={stages} with blocks={blocks} are not all there: there are weights of the '
            f'(stage, block) {", ".join(map(str, maps.weights))}'
        )
    panels = [_make_panel(maps, stage, chosen[stage], mean_heads) for stage in chosen]
    figure = _draw(panels, maps.picture, title)
    with complete_file(Path(out)) as file:
        figure.savefig(file, dpi=DPI, format='png')


def _make_panel(maps: SaliencyMaps, stage: int, blocks: List[int], mean_heads: bool) -> Panel:
    num_heads, height, width = maps.weights[stage, blocks[0]].shape
    heading = f'stage {stage}: {height} x {width} positions'
    share = max(float(maps.padding_share(stage, block).max()) for block in blocks)
    if share > 0:
        heading += f', some on padding (at most {share:.1%} of the weight of a head)'
    relative = {block: maps.on_picture(stage, block) * height * width for block in blocks}
    if mean_heads:
        means = torch.stack([weights.mean(dim=0) for weights in relative.values()])
        return Panel(heading, [f'block {block}' for block in blocks], {'mean of heads': means})
    return Panel(
        heading,
        [f'head {head}' for head in range(num_heads)],
        {f'block {block}': weights for block, weights in relative.items()},
    )


def _draw(panels: List[Panel], picture: np.ndarray, title: str) -> Figure:
    largest = max(float(weights.max()) for panel in panels for weights in panel.rows.values())
    limit = next((limit for limit in LIMITS if largest <= limit), LIMITS[-1])
    colours = ScalarMappable(LogNorm(1 / limit, limit, clip=True), 'RdBu_r')
    cell_height = CELL * picture.shape[0] / picture.shape[1]
    # Twice the pixels of the sheet are enough.
    scale = min(1.0, 2 * CELL * DPI / picture.shape[1])
    size = [max(round(side * scale), 1) for side in picture.shape[:2]]
    picture = _resize(torch.from_numpy(picture).permute(2, 0, 1) / 255, size).transpose(1, 2, 0)
    shades = 0.6 + 0.4 * picture.mean(axis=2, keepdims=True)

    num_columns = 1 + max(len(panel.columns) for panel in panels)
    width = max(MARGIN + num_columns * (CELL + GAP) + GAP, MIN_WIDTH)
    row_height = cell_height + CAPTION + GAP
    height = HEADER + sum(HEADING + len(panel.rows) * row_height for panel in panels)
    figure = Figure(figsize=(width, height))

    def place(x: float, y: float, w: float, h: float) -> Axes:
        axes = figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))
        axes.set(xticks=[], yticks=[])
        return axes

    def write(x: float, y: float, text: str, **kwargs: Any) -> None:
        figure.text(x / width, 1 - y / height, text, va='center', **kwargs)

    write(GAP, 0.2, title, fontsize=12, weight='bold')
    bar = place(MARGIN, 0.45, 4, 0.15)
    figure.colorbar(colours, cax=bar, orientation='horizontal', extend='both')
    steps = [limit**0.5, limit]
    bar.set_xticks(
        [*(1 / step for step in steps), 1, *steps],
        [*(f'1/{step:.4g}' for step in steps), '1', *(f'{step:.4g}' for step in steps)],
    )
    bar.minorticks_off()
    write(
        4.6,
        0.6,
        'weight of a position / mean weight of all positions of the head;\nbelow each map its lowest and highest value',
        fontsize=9,
    )

    y = HEADER
    for panel in panels:
        write(GAP, y + 0.1, panel.heading, fontsize=10, weight='bold')
        y += HEADING
        x = MARGIN
        place(x, y, CELL, cell_height).imshow(picture, aspect='auto')
        write(x + CELL / 2, y - 0.1, 'input', fontsize=9, ha='center')
        for column, label in enumerate(panel.columns, 1):
            write(x + column * (CELL + GAP) + CELL / 2, y - 0.1, label, fontsize=9, ha='center')
        for label, weights in panel.rows.items():
            write(x - 0.15, y + cell_height / 2, label, fontsize=9, ha='center', rotation=90)
            for column, (weight, shown) in enumerate(zip(weights, _resize(weights, size)), 1):
                colour = colours.to_rgba(shown)[..., :3]
                axes = place(x + column * (CELL + GAP), y, CELL, cell_height)
                axes.imshow(colour * shades, aspect='auto')
                x_centre = x + column * (CELL + GAP) + CELL / 2
                caption = f'{float(weight.min()):#.3g} to {float(weight.max()):#.3g}'
                write(x_centre, y + cell_height + CAPTION / 2, caption, fontsize=8, ha='center')
            y += row_height
    return figure


def _resize(maps: Tensor, size: List[int]) -> np.ndarray:
    return F.interpolate(maps[None], size, mode='area')[0].numpy()

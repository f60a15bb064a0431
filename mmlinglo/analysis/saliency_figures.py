# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Sheets of the weights that key-only attention gives to the positions of a picture."""

import math
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Union

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from mmlinglo.utils.files import complete_file

from .saliency import SaliencyMaps

COLUMNS = 6  # tiles in a row of the sheet at most
TILE = 2.4  # width of a tile in inches
COLOURS = 'inferno'
SHARE = 0.65  # of the colour in a pixel; the rest is the picture


def plot_saliency(
    maps: SaliencyMaps,
    out: Union[str, Path],
    title: str,
    stages: Optional[Sequence[int]] = None,
    blocks: Optional[Sequence[int]] = None,
    mean_heads: bool = False,
) -> None:
    """Draw the weights over the picture: a tile for the picture, and one for each stage, block and head.

    The colours of each tile go from the 2nd to the 98th percentile of its own weights, and are interpolated
    between the positions. Above a tile stand its lowest and highest weight over the mean weight of its head,
    which is 1 / N with N positions.

    Args:
        maps: What :func:`~mmlinglo.analysis.saliency_maps` returned.
        out: PNG file to write; its folder is made.
        title: First line of the sheet.
        stages: Numbers of the stages to draw, from 0; None for all.
        blocks: Numbers of their blocks to draw, from 0; None for all.
        mean_heads: Whether to draw the mean over the heads of each block only.

    Raises:
        ValueError: If there is no such stage, or none of the stages has such a block.
    """
    chosen = [
        (stage, block)
        for stage, block in maps.weights
        if (stages is None or stage in stages) and (blocks is None or block in blocks)
    ]
    known, found = {stage for stage, _ in maps.weights}, {block for _, block in chosen}
    if not chosen or not set(stages or ()) <= known or not set(blocks or ()) <= found:
        raise ValueError(
            f'stages={stages} with blocks={blocks} are not all there: there are weights of the '
            f'(stage, block) {", ".join(map(str, maps.weights))}'
        )
    tiles: Dict[str, Any] = {}
    notes: Dict[int, List[Any]] = {}
    for stage, block in chosen:
        weights = maps.weights[stage, block]
        _, height, width = weights.shape
        relative = (weights * height * width).numpy()
        heads = {f'Head {number}': head for number, head in enumerate(relative)}
        if mean_heads:
            heads = {'Mean of Heads': relative.mean(axis=0)}
        for name, values in heads.items():
            tiles[f'Stage {stage}, Block {block}, {name}'] = (stage, values)
        notes.setdefault(stage, [f'Stage {stage}: {height} x {width} Positions', 0.0])
        notes[stage][1] = max(notes[stage][1], float(maps.padding_share(stage, block).max()))
    lines = [
        text + (f', at Most {share:.1%} of the Weight of a Head on Padding' if share else '')
        for text, share in notes.values()
    ]
    figure = _draw(maps, tiles, f'{title}\n{"; ".join(lines)}')
    with complete_file(Path(out)) as file:
        figure.savefig(file, dpi=110, format='png')


def _draw(maps: SaliencyMaps, tiles: dict, title: str) -> Figure:
    height, width = maps.picture.shape[:2]
    number = len(tiles) + 1
    # The number of columns that leaves fewest places empty, of 4, 5 and 6.
    columns = min(range(COLUMNS, 3, -1), key=lambda c: -number % c) if number > COLUMNS else number
    rows = math.ceil(number / columns)
    size = (TILE * max(columns, 3), rows * (TILE * height / width + 0.5) + 1.1)
    figure = Figure(figsize=size, layout='constrained')
    figure.suptitle(title, fontsize=9, wrap=True)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    grid.flat[0].imshow(maps.picture)
    grid.flat[0].set_title('Input', fontsize=9)
    grey = maps.picture.mean(axis=2)
    for axes, (name, (stage, values)) in zip(grid.flat[1:], tiles.items()):
        axes.imshow(grey, 'gray', vmin=0, vmax=255)
        stride, offset = maps.grids[stage]
        # The outermost positions once more, for the pixels beyond their centres.
        padded = np.pad(values, 1, mode='edge')
        left = top = offset - 1.5 * stride
        extent = (left, left + padded.shape[1] * stride, top + padded.shape[0] * stride, top)
        low, high = np.percentile(values, (2, 98))
        style = dict(interpolation='bilinear', alpha=SHARE, vmin=low, vmax=high)
        axes.imshow(padded, COLOURS, extent=extent, **style)
        axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        axes.set_title(f'{name}\n{values.min():#.3g} to {values.max():#.3g}', fontsize=9)
    bar = figure.colorbar(
        ScalarMappable(cmap=COLOURS), ax=grid, location='bottom', shrink=0.5, aspect=40, pad=0.02
    )
    bar.set_ticks([0, 1], labels=['2nd Percentile', '98th Percentile'])
    bar.set_label(
        'Weight of a Position, over the Mean of Its Head; Scaled for Each Map', fontsize=9
    )
    return figure

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""What the padding of a batch does to an image's features, and what it costs to keep it from doing so."""

from typing import List, Sequence, Tuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlinglo.analysis.benchmark import make_step, pad, time_steps
from mmlinglo.analysis.peers import STAGES, Plain, build_backbone

BACKBONES = ('linglo_b0', 'pvt_v2_b0', 'linglo_b0_mask_padding')


@torch.inference_mode()
def measure_shift(model: nn.Module, image: Tensor, padding: int) -> float:
    """Measure how far padding on its right moves the features of an image's left half.

    Args:
        model: Backbone in evaluation mode; its last map has stride 32.
        image: (C, H, W), W a multiple of 64.
        padding: Width of the zeros in pixels.

    Returns:
        Norm of the difference over the norm of the features without padding, in
        the left half of the last map.

    Raises:
        ValueError: If the image's width is no multiple of 64, or ``padding`` is negative.
    """
    height, width = image.shape[1:]
    if width % 64:
        raise ValueError(f'the image must be a multiple of 64 pixels wide, got {width}')
    if padding < 0:
        raise ValueError(f'padding must be at least 0 pixels, got {padding}')
    size = [[(height, width)]] if isinstance(model, Plain) else []  # LinGlo is told it
    half = width // 64  # columns of stride 32
    alone, padded = (
        model(F.pad(image[None], (0, pixels)), *size)[-1][..., :half] for pixels in (0, padding)
    )
    return float((padded - alone).norm() / alone.norm())


def measure_shifts(
    paddings: Sequence[int], size: int = 320, seeds: Sequence[int] = range(5)
) -> List[dict]:
    """Move the features of random images by padding, for each of :data:`BACKBONES`.

    Args:
        paddings: Widths in pixels.
        size: Height and width of the images in pixels.
        seeds: One set of weights and one image each.

    Returns:
        Rows with ``backbone``, ``padding``, and ``shift`` with ``shift_min`` and
        ``shift_max``: mean and extremes over the seeds, in percent.
    """
    shifts = []
    for name in BACKBONES:
        for seed in seeds:
            image = torch.randn(3, size, size, generator=torch.Generator().manual_seed(seed))
            torch.manual_seed(seed)
            model = build_backbone(name, (size, size), STAGES)
            for padding in paddings:
                shifts.append((name, padding, 100 * measure_shift(model, image, padding)))
    table = pd.DataFrame(shifts, columns=['backbone', 'padding', 'shift'])
    found = table.groupby(['backbone', 'padding'], sort=False)['shift']
    found = found.agg(shift='mean', shift_min='min', shift_max='max').reset_index()
    return found.to_dict('records')


def measure_cost(
    sizes: Sequence[Tuple[int, int]], device: str = 'cpu', rounds: int = 5
) -> List[dict]:
    """Time LinGlo-b0 deployed, with and without ``mask_padding``, in interleaved rounds.

    Args:
        sizes: Height and width in pixels of each image in the batch.
        device: Where.
        rounds: Rounds of timing, at least 2.

    Returns:
        A row with ``work``, ``plain_ms`` and ``masked_ms``, medians of a batch, and their ``ratio``.

    Raises:
        ValueError: If ``rounds`` is below 2.
    """
    shape = pad([max(lengths) for lengths in zip(*sizes)])
    images = torch.randn(len(sizes), 3, *shape, device=device)
    steps = {}
    for name in (BACKBONES[0], BACKBONES[2]):
        model = build_backbone(name, shape, STAGES, True).to(device)
        steps[name] = make_step(model, images, sizes, train_step=False)
    plain, masked = (median for _, median, _ in time_steps(steps, rounds, warmup=1).values())
    return [dict(work='inference', plain_ms=plain, masked_ms=masked, ratio=masked / plain)]

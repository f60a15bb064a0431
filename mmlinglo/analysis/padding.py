# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""What the padding of a batch does to an image's features, and what it costs to keep it from doing so."""

from typing import Callable, Dict, Iterator, List, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlinglo import LinGlo
from mmlinglo.analysis.benchmark import time_steps
from mmlinglo.analysis.peers import PEERS, build_backbone

MASKED = 'linglo_b0_mask_padding'
LABELS: Dict[str, str] = {
    **{name: PEERS[name].label for name in ('linglo_b0', 'pvt_v2_b0')},
    MASKED: 'LinGlo-b0, mask_padding',
}
"""What is compared, and how it is called in tables."""


def build(name: str, seed: int) -> nn.Module:
    """A backbone of :data:`LABELS` in evaluation mode with random weights of a seed."""
    torch.manual_seed(seed)
    if 'linglo' not in name:
        return build_backbone(name, (320, 320), maps=True)
    return LinGlo('b0', mask_padding=name == MASKED).eval()


@torch.inference_mode()
def feature_shift(model: nn.Module, image: Tensor, padding: int) -> float:
    """How far padding on its right moves the features of an image's left half.

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
    half = width // 64  # columns of stride 32
    alone, padded = (
        _maps(model, F.pad(image[None], (0, pixels)), [(height, width)])[-1][..., :half]
        for pixels in (0, padding)
    )
    return float((padded - alone).norm() / alone.norm())


def measure_shifts(
    paddings: Sequence[int], size: int = 320, seeds: Sequence[int] = range(5)
) -> Iterator[dict]:
    """Move the features of random images by padding, for each backbone of :data:`LABELS`.

    Args:
        paddings: Widths in pixels.
        size: Height and width of the images in pixels.
        seeds: One set of weights and one image each.

    Yields:
        Rows with ``backbone``, ``padding``, and ``shift`` with ``shift_min`` and
        ``shift_max``: mean and extremes over the seeds, in percent.
    """
    for name in LABELS:
        models = [build(name, seed) for seed in seeds]
        images = [
            torch.randn(3, size, size, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        for padding in paddings:
            shifts = [
                100 * feature_shift(model, image, padding) for model, image in zip(models, images)
            ]
            yield dict(
                backbone=name,
                padding=padding,
                shift=sum(shifts) / len(shifts),
                shift_min=min(shifts),
                shift_max=max(shifts),
            )


def measure_cost(
    sizes: Sequence[Tuple[int, int]], device: str = 'cpu', rounds: int = 5
) -> List[dict]:
    """Time LinGlo-b0 with and without ``mask_padding`` on one padded batch, in interleaved rounds.

    Args:
        sizes: Height and width in pixels of each image in the batch.
        device: Where.
        rounds: Rounds of timing, at least 2.

    Returns:
        A row each for the deployed forward pass and the training step: ``work``,
        ``plain_ms`` and ``masked_ms``, medians of a batch, and their ``ratio``.

    Raises:
        ValueError: If ``rounds`` is below 2.
    """
    height, width = (-(-max(size[i] for size in sizes) // 32) * 32 for i in range(2))
    images = torch.randn(len(sizes), 3, height, width, device=device)
    rows = []
    for work in ('inference', 'training step'):
        steps = {
            name: _step(name, images, sizes, training=work == 'training step', device=device)
            for name in ('linglo_b0', MASKED)
        }
        plain, masked = (time for _, time, _ in time_steps(steps, rounds, warmup=1).values())
        rows.append(dict(work=work, plain_ms=plain, masked_ms=masked, ratio=masked / plain))
    return rows


def _step(
    name: str, images: Tensor, sizes: Sequence[Tuple[int, int]], training: bool, device: str
) -> Callable[[], None]:
    model = build(name, seed=0).train(training)
    if not training:
        model.switch_to_deploy()
    model.to(device)

    @torch.inference_mode()
    def infer() -> None:
        _maps(model, images, sizes)

    def train() -> None:
        model.zero_grad()
        sum(m.sum() for m in _maps(model, images, sizes)).backward()

    return train if training else infer


def _maps(model: nn.Module, images: Tensor, sizes: Sequence[Tuple[int, int]]) -> List[Tensor]:
    """Feature maps; LinGlo is told the images' sizes."""
    is_linglo = isinstance(model, LinGlo)
    return list(model(images, sizes) if is_linglo else model(images))

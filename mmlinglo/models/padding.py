# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Evaluation of a padded batch as if each image were alone."""

from typing import Callable, Dict, List, Optional, Sequence, Tuple

from torch import Tensor

from .data_preprocessors import IMAGE_SIZES

ImageSizes = Sequence[Tuple[int, int]]


def forward_unpadded(
    forward: Callable[[Tensor], Sequence[Tensor]],
    x: Tensor,
    image_sizes: Optional[ImageSizes],
    strides: Sequence[int],
) -> Tuple[Tensor, ...]:
    """Call a backbone on the images without their padding, those of equal size at once.

    Args:
        forward: Maps images (B, C, H, W) to one (B, C_i, ceil(H / s_i), ceil(W / s_i)) for each
            of ``strides`` s_i.
        x: Images, padded to the right and below, (B, C, H, W).
        image_sizes: Height and width of each image without padding; None for what a data
            preprocessor of :mod:`.data_preprocessors` has left at ``x``.
        strides: In pixels, of the maps.

    Returns:
        Maps of the shapes of ``forward(x)``, with zeros outside of the images.

    Raises:
        ValueError: If the sizes are missing or do not fit.
    """
    height, width = x.shape[-2:]
    groups: Dict[Tuple[int, int], List[int]] = {}
    for index, size in enumerate(_find_image_sizes(x, image_sizes)):
        groups.setdefault(size, []).append(index)
    if set(groups) <= {(height, width)}:
        return tuple(forward(x))
    padded: List[Tensor] = []
    for (h, w), indices in groups.items():
        maps = forward(x[indices, :, :h, :w])
        if not padded:
            padded = [
                m.new_zeros(len(x), m.shape[1], -(-height // s), -(-width // s))
                for m, s in zip(maps, strides)
            ]
        for out, m in zip(padded, maps):
            out[indices, :, : m.shape[2], : m.shape[3]] = m
    return tuple(padded)


def _find_image_sizes(x: Tensor, image_sizes: Optional[ImageSizes]) -> List[Tuple[int, int]]:
    if image_sizes is None:
        image_sizes = getattr(x, IMAGE_SIZES, None)
    if image_sizes is None:
        raise ValueError(
            'mask_padding=True needs the sizes of the images before padding: set '
            "data_preprocessor.type='mmlinglo.SizedDetDataPreprocessor' (mmdet) or "
            "'mmlinglo.SizedSegDataPreProcessor' (mmseg) in the config, or pass image_sizes"
        )
    height, width = x.shape[-2:]
    try:
        sizes = [(int(h), int(w)) for h, w in image_sizes]
    except (TypeError, ValueError):  # not two numbers for each image
        sizes = [(0, 0)]
    if len(sizes) != len(x) or not all(0 < h <= height and 0 < w <= width for h, w in sizes):
        raise ValueError(
            'image_sizes must be the height and width of each image in a batch of shape '
            f'{tuple(x.shape)}, got {image_sizes!r}'
        )
    return sizes

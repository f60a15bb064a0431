# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The weights that key-only attention gives to the positions of a picture (paper Eq. 2)."""

import math
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from torch import Tensor, nn

from mmlinglo.models import KeyOnlyAttention, LinGlo
from mmlinglo.utils.inference import InputPipeline, UnreadableError

Block = Tuple[int, int]


class Grid(NamedTuple):
    """Where the positions of a stage lie: number i of a row is centred on pixel ``offset + i * stride``."""

    stride: int
    offset: float


@dataclass(frozen=True)
class SaliencyMaps:
    """What :func:`saliency_maps` returns.

    Attributes:
        weights: For each (stage, block), both numbered from 0, the weights of its
            attention, (num_heads, H, W), on the CPU. Those of a head sum to 1 over
            its H * W positions, padding included.
        picture: The picture as the network saw it, resized and cropped but
            neither normalized nor padded, (H, W, 3) RGB uint8; shades of grey for
            a tensor.
        grids: For each stage, where its positions lie on the picture.
        skipped: For each stage without such weights, why.
    """

    weights: Dict[Block, Tensor]
    picture: np.ndarray
    grids: Dict[int, Grid]
    skipped: Dict[int, str]

    def on_picture(self, stage: int, block: int) -> Tensor:
        """Weights of the positions nearest to each pixel of :attr:`picture`, (num_heads, H, W).

        Raises:
            KeyError: If the block has no weights.
        """
        weights = self.weights[stage, block]
        stride, offset = self.grids[stage]
        rows, columns = (
            ((torch.arange(pixels) - offset) / stride + 0.5).long().clamp(0, positions - 1)
            for pixels, positions in zip(self.picture.shape, weights.shape[1:])
        )
        return weights[:, rows][:, :, columns]

    def padding_share(self, stage: int, block: int) -> Tensor:
        """Part of each head's weight on positions centred outside of :attr:`picture`, (num_heads,).

        Padding is to the right and below. The attention does not know of it.

        Raises:
            KeyError: If the block has no weights.
        """
        weights = self.weights[stage, block]
        stride, offset = self.grids[stage]
        height, width = (math.ceil((pixels - offset) / stride) for pixels in self.picture.shape[:2])
        return weights[:, height:].sum((1, 2)) + weights[:, :height, width:].sum((1, 2))


@torch.no_grad()
def saliency_maps(
    model: nn.Module, image: Union[str, Path, np.ndarray, Tensor], cfg: Optional[Config] = None
) -> SaliencyMaps:
    """Run a model on one picture and keep the weights of its key-only attention.

    They are the very values of that forward pass, whichever order the attention
    computes in: hooks take what its softmax returns.

    Args:
        model: Classifier, detector or segmentor with a LinGlo backbone, or the
            backbone alone; in evaluation mode.
        image: File, or pixels (H, W, in_channels), in BGR if three: they go through the config's
            test pipeline and the whole model; a file through the config's own loader. Or a normalized image as a tensor
            (C, H, W), which goes through the backbone alone.
        cfg: Config of the experiment; None for the one that the toolboxes'
            ``init_detector``, ``init_model`` and ``get_model`` keep in the model.

    Raises:
        UnreadableError: If the file is missing, damaged or no picture.
        ValueError: If the model is in training mode, compiled, or has no key-only
            attention; if it needs several passes for a picture, as with sliding
            windows; if the image has another shape; if the config is not known.
    """
    backbone = _find_backbone(model)
    attentions, skipped = _find_attentions(backbone)
    channels = backbone.in_channels
    if isinstance(image, Tensor):
        if image.dim() != 3 or len(image) != channels:
            raise ValueError(
                f'a tensor must have the shape ({channels}, H, W), got {tuple(image.shape)}'
            )
        picture = _to_picture(image.float().mean(dim=0, keepdim=True))
        with _record(backbone, attentions) as (shapes, results):
            backbone(image[None].to(backbone.patch_embed.conv.weight))
    else:
        data = _prepare(model, image, cfg, channels)
        picture = _to_picture(data['inputs'])
        with _record(backbone, attentions) as (shapes, results):
            model.test_step(pseudo_collate([data]))

    if len(shapes) != 1 or shapes[0][0] != 1:
        raise ValueError(
            f'for one picture the backbone was run on inputs of the shapes {shapes}: the weights '
            "are those of one pass, so set mode='whole' in model.test_cfg if it says 'slide', and "
            'leave test-time augmentation out'
        )
    if not all(len(calls) == 1 for calls in results.values()):
        raise ValueError('the hooks were not called: give the model as it was before torch.compile')
    height, width = shapes[0][2:]
    grids, sizes = _find_grids(backbone, (height, width))
    weights = {
        block: calls[0][0].unflatten(-1, sizes[block[0]]).cpu() for block, calls in results.items()
    }
    return SaliencyMaps(weights, picture, grids, skipped)


def _find_backbone(model: nn.Module) -> LinGlo:
    found = [module for module in model.modules() if isinstance(module, LinGlo)]
    if len(found) != 1:
        raise ValueError(
            'expected a model with one LinGlo backbone, or the backbone, '
            f'got a {type(model).__name__} with {len(found)} of them'
        )
    if model.training:
        raise ValueError('saliency_maps() needs evaluation mode: call model.eval() first')
    return found[0]


def _find_attentions(backbone: LinGlo) -> Tuple[Dict[Block, KeyOnlyAttention], Dict[int, str]]:
    attentions, skipped = {}, {}
    for i, stage in enumerate(backbone.stages):
        for j, block in enumerate(stage.blocks):
            attention = getattr(block, 'attn', None)
            if isinstance(attention, KeyOnlyAttention):
                attentions[i, j] = attention
            elif attention is None:
                skipped[i] = f'{type(block).__name__} has no attention'
            else:
                kind = type(attention).__name__
                skipped[i] = f'{kind} weighs pairs of positions, not single ones'
    if not attentions:
        reasons = '; '.join(f'stage {i}: {reason}' for i, reason in skipped.items())
        raise ValueError(f'this backbone has no key-only attention: {reasons}')
    return attentions, skipped


def _find_grids(
    backbone: LinGlo, size: Tuple[int, int]
) -> Tuple[Dict[int, Grid], Dict[int, Tuple[int, int]]]:
    """Grid, height and width of each stage, for an input of ``size``."""
    grids, sizes = {}, {}
    stride, offset = 1, 0.0
    for i, stage in enumerate(backbone.stages):
        embed = stage.downsample if i else backbone.patch_embed
        if embed is not None:
            offset += stride * ((embed.conv.kernel_size[0] - 1) / 2 - embed.conv.padding[0])
            stride *= embed.stride
            size = (-(-size[0] // embed.stride), -(-size[1] // embed.stride))
        grids[i], sizes[i] = Grid(stride, offset), size
    return grids, sizes


@contextmanager
def _record(
    backbone: LinGlo, attentions: Dict[Block, KeyOnlyAttention]
) -> Iterator[Tuple[List[Tuple[int, ...]], Dict[Block, List[Tensor]]]]:
    """Shapes of the backbone's inputs, and for each attention what its softmax returned."""
    shapes: List[Tuple[int, ...]] = []
    results: Dict[Block, List[Tensor]] = {block: [] for block in attentions}
    with ExitStack() as hooks:
        hooks.enter_context(
            backbone.register_forward_pre_hook(lambda _, x: shapes.append(tuple(x[0].shape)))
        )
        for block, attention in attentions.items():
            hook = attention.softmax.register_forward_hook(
                lambda *call, calls=results[block]: calls.append(call[2])
            )
            hooks.enter_context(hook)
        yield shapes, results


def _prepare(
    model: nn.Module, image: Union[str, Path, np.ndarray], cfg: Optional[Config], channels: int
) -> dict:
    """Apply the config's test pipeline, without annotations."""
    if cfg is None:
        cfg = getattr(model, 'cfg', None) or getattr(model, '_config', None)
    if cfg is None or not hasattr(model, 'test_step'):
        raise ValueError(
            'a file or an array needs a classifier, detector or segmentor and its config (cfg): '
            f'for this {type(model).__name__} give a normalized tensor'
        )
    source = image if isinstance(image, np.ndarray) else Path(image)
    try:
        return InputPipeline(cfg)(source, channels).data
    except UnreadableError as error:
        raise UnreadableError(f'{str(source)!r}: {error}') from error


def _to_picture(pixels: Tensor) -> np.ndarray:
    """Map (C, H, W) in BGR, OpenMMLab's order, to (H, W, 3) in RGB.

    Three channels of bytes stay as they are; others become shades of grey, from the 2nd to the 98th percentile.
    """
    pixels = pixels.float()
    if len(pixels) != 3:
        grey = pixels.mean(dim=0, keepdim=True).expand(3, -1, -1)
        low, high = np.percentile(grey[0].cpu(), (2, 98))
        pixels = (grey - low) / max(high - low, 1e-6) * 255
    return pixels.flip(0).clamp(0, 255).round().byte().permute(1, 2, 0).cpu().numpy()

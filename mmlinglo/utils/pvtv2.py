# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Start a LinGlo from the weights of a PVTv2 (arXiv 2106.13797) of the same size.

Both networks have the same stem, widths, feed-forward networks and norms. The other
parts start as follows:

- Down-sampling: PVTv2 normalizes a stage's output before the next down-sampling.
  LinGlo normalizes only the maps that it returns. So the norm's weights go into the
  down-sampling convolution. The norm divides by each position's spread; LinGlo
  divides by the mean spread.
- Positional encoding: PVTv2's depth-wise convolution, with kernel w and bias b,
  becomes the first of LinGlo's branches. Its kernel is w minus the identity, which
  the skip adds. Its batch norm, with statistics from images, cancels its own
  normalization and adds b. So training mode and evaluation mode start from the same
  function, up to the differences between batches. The other branches have new
  kernels, and batch norms with weight 0.
- Attention: PVTv2's attention is a weighted mean of values over positions. Key-only
  attention takes a weighted mean of its keys. So the keys start as PVTv2's values,
  the saliency as 0 (uniform weights), the values as 1, ``mix`` as the identity, and
  ``proj`` as PVTv2's.
- Additional blocks: they repeat the block before them, but the last layer of both
  halves is zero. So they are the identity, and have gradients.

Then a least-squares fit adapts attention and down-sampling, in the order of the
network, to what PVTv2 computes at the same place for the same images. The input of
each fit comes from the converted layers before it, so that it corrects errors
instead of adding them up. PVTv2's queries and spatial reduction have no other use.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.model.weight_init import update_init_info
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader

from mmlinglo.checkpoint import (
    CheckpointError,
    find_state_dict,
    import_optional,
    load_checkpoint_file,
    load_model_weights,
)
from mmlinglo.models import LinGlo
from mmlinglo.models.network import ENCODINGS
from mmlinglo.registry import WEIGHT_INITIALIZERS

Maps = List[Tensor]  # one tensor for each batch of images
Layer = Any  # of either network; torch declares the parts of a module as `Tensor | Module`

# LinGlo's depths, and PVTv2's where they differ.
PVTV2_DEPTHS = {(2, 3, 3, 2): (2, 2, 2, 2), (3, 5, 9, 3): (3, 4, 6, 3)}

# Where a tensor of LinGlo can come from, see convert_pvtv2.
ORIGINS = ('taken', 'derived', 'repeated', 'new')

# The stem's kernel in timm, in github.com/whai362/PVT, whose names timm itself knows, and in mmdet.
STEMS = ('patch_embed.proj.weight', 'patch_embed1.proj.weight', 'layers.0.0.projection.weight')
# From mmdet's names, or those of timm's features_only, to timm's.
TO_TIMM = (
    (r'^stages_(\d+)', r'stages.\1'),
    (r'^layers\.0\.0\.', 'patch_embed.'),
    (r'^layers\.(\d+)\.0\.', r'stages.\1.downsample.'),
    (r'^layers\.(\d+)\.1\.(\d+)\.', r'stages.\1.blocks.\2.'),
    (r'^layers\.(\d+)\.2\.', r'stages.\1.norm.'),
    (r'\.projection\.', '.proj.'),
    (r'\.attn\.attn\.out_proj\.', '.attn.proj.'),
    (r'\.attn\.attn\.in_proj_', '.attn.qkv.'),
    (r'\.ffn\.layers\.0\.', '.mlp.fc1.'),
    (r'\.ffn\.layers\.1\.', '.mlp.dwconv.'),
    (r'\.ffn\.layers\.4\.', '.mlp.fc2.'),
)


@WEIGHT_INITIALIZERS.register_module()
@dataclass
class PVTv2Init:
    """Start a LinGlo from a checkpoint of PVTv2 when a training starts.

    In a config, write ``init_cfg=dict(type='mmlinglo.PVTv2Init', checkpoint=..., images=...)``. The checkpoint must
    have all weights of the backbone, and they must fit. :func:`convert_pvtv2` explains the conversion. Its results go
    to the log. ``tools/model_converters/pvtv2_to_linglo.py`` does the same once, with the images of the config, and
    writes a file.

    Args:
        checkpoint: Path or URL, see :func:`load_pvtv2`.
        images: Folder with images, also in its sub-folders, preferably those of the training. They serve to fit what
            the two networks do not share.
        num_images: Number of images to use, at least 2, evenly spread over the sorted names.
        steps: Gradient steps for each fitted layer.

    Raises:
        CheckpointError: When it is called, if the checkpoint is unreadable or another model's, the backbone is a
            variant that cannot start from PVTv2, or there are too few images or damaged ones.
    """

    checkpoint: str
    images: str
    num_images: int = 256
    steps: int = 100

    def __call__(self, linglo: LinGlo) -> None:
        training = linglo.training
        pvtv2 = load_pvtv2(load_checkpoint_file(self.checkpoint), linglo.arch, self.checkpoint)
        images = read_images(self.images, self.num_images)
        batches = images.split(max(1, min(16, len(images) // 2)))
        conversion = convert_pvtv2(pvtv2, linglo, batches, self.steps)
        linglo.train(training)
        info = f'{type(self).__name__}: {self.checkpoint}'
        if hasattr(linglo, '_params_init_info'):  # else mmengine reports all weights as unchanged
            update_init_info(linglo, init_info=info)
        print_log(f'{info}: {describe_conversion(*conversion)}', logger='current')


def read_images(folder: Union[str, Path], count: int, size: int = 224) -> Tensor:
    """Read images as classifiers see them in evaluation, normalized with ImageNet's mean and spread.

    Args:
        folder: Folder with images, also in its sub-folders.
        count: Number of images to read. If the folder has fewer, all of them.
        size: Height and width in pixels.

    Returns:
        Images (B, 3, ``size``, ``size``).

    Raises:
        CheckpointError: If there are fewer than 2 images, or one of them is damaged.
    """
    prepare = transforms.Compose(
        [
            transforms.Resize(size * 8 // 7, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    paths = sorted(p for p in Path(folder).rglob('*') if p.suffix.lower() in IMG_EXTENSIONS)
    if len(paths) < 2:
        raise CheckpointError(f'{str(folder)!r} holds {len(paths)} images, at least 2 are needed')
    images = []
    for index in np.linspace(0, len(paths) - 1, min(count, len(paths))).astype(int):
        try:
            images.append(prepare(default_loader(paths[index])))
        except OSError as error:
            raise CheckpointError(
                f'{str(paths[index])!r} is no image that can be read: remove or replace it'
            ) from error
    return torch.stack(images)


def load_pvtv2(checkpoint: dict, arch: dict, source: str) -> nn.Module:
    """Build timm's PVTv2 of a LinGlo's size from a checkpoint, in evaluation mode.

    Args:
        checkpoint: What :func:`mmlinglo.utils.load_checkpoint_file` returned. The names may be those
            of timm, mmdet or the PVT repository. The checkpoint may be a bare backbone, or a classifier
            or detector with a prefix before all names.
        arch: :attr:`LinGlo.arch`. The depths come from :data:`PVTV2_DEPTHS`, else from LinGlo.
        source: Name for the error message.

    Returns:
        The network. Its ``head`` is the classifier's linear layer if the checkpoint has one.

    Raises:
        CheckpointError: If there is no PVTv2 in the file, or one of another size, or timm is missing.
    """
    timm_pvt = import_optional('timm.models.pvt_v2', 'PVTv2')
    weights = find_state_dict(checkpoint)
    found = (re.fullmatch(rf'(|.*\.)({"|".join(map(re.escape, STEMS))})', key) for key in weights)
    prefix = next((match[1] for match in found if match), None)
    if prefix is None:
        raise CheckpointError(
            f'{source!r} holds no PVTv2: none of {", ".join(STEMS)} is among its {len(weights)} '
            f"tensors ({', '.join([*weights][:3])}, ...). Give a checkpoint of timm's, mmdet's or "
            "the PVT repository's PVTv2"
        )
    # `head.fc` is mmpretrain's classifier
    renamed = {re.sub(r'^head\.fc\.', f'{prefix}head.', k): v for k, v in weights.items()}
    network = {k.removeprefix(prefix): v for k, v in renamed.items() if k.startswith(prefix)}
    network = _rename_as_timm(network)
    depths = PVTV2_DEPTHS.get(arch['depths'], arch['depths'])
    model = timm_pvt.PyramidVisionTransformerV2(
        num_classes=sum(network['head.bias'].shape) if 'head.bias' in network else 0,
        depths=depths,
        embed_dims=arch['embed_dims'],
        num_heads=arch['num_heads'],
        mlp_ratios=arch['mlp_ratio'],
    )
    try:
        load_model_weights(model, timm_pvt.checkpoint_filter_fn(network, model), source)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} (in timm's names). A LinGlo of the widths {arch['embed_dims']} and depths "
            f'{arch["depths"]} starts from a PVTv2 of these widths and the depths {depths}'
        ) from error
    return model.eval()


def _rename_as_timm(weights: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Weights with timm's names and shapes; those of the PVT repository stay as they are."""
    renamed = {}
    for name, value in weights.items():
        for pattern, replacement in TO_TIMM:
            name = re.sub(pattern, replacement, name)
        if re.search(r'\.mlp\.fc\d\.weight$', name) and value.dim() == 4:
            value = value.flatten(1)  # mmdet's are 1x1 convolutions
        if '.attn.qkv.' in name and value.dim() > 0:
            query, *key_and_value = value.chunk(3)
            renamed[name.replace('.qkv.', '.q.')] = query
            name, value = name.replace('.qkv.', '.kv.'), torch.cat(key_and_value)
        renamed[name] = value
    return renamed


def convert_pvtv2(
    pvtv2: Layer, linglo: LinGlo, images: Sequence[Tensor], steps: int = 200
) -> Tuple[Dict[str, str], List[float]]:
    """Give a LinGlo the initial values that this module describes, in place.

    Args:
        pvtv2: The network from :func:`load_pvtv2`. Afterwards it is on the device of ``linglo``.
        linglo: The initialized backbone. Afterwards it is in evaluation mode.
        images: At least 2 batches (B, 3, H, W), normalized as for training. The fits do
            not use the last fifth of them, at least one batch.
        steps: Gradient steps for each fitted layer, on one batch each. 0 fits nothing.

    Returns:
        For each tensor of ``linglo``: ``'taken'`` from PVTv2 as it is, ``'derived'``
        from PVTv2's tensors, ``'repeated'`` in an additional block, or ``'new'``.
        For each stage: the difference between its output, normalized by PVTv2's norm,
        and PVTv2's output, as a ratio of root mean squares, on the images that the fits
        did not use.

    Raises:
        CheckpointError: If ``linglo`` is a variant whose layers have no counterparts in PVTv2,
            or there are too few batches.
    """
    _check_variant(linglo)
    if len(images) < 2:
        raise CheckpointError(f'at least 2 batches of images are needed, got {len(images)}')
    device = next(linglo.parameters()).device
    converter = _Converter(linglo.eval(), [batch.to(device) for batch in images], steps)
    return converter.convert(pvtv2.to(device))


def describe_conversion(origins: Dict[str, str], differences: List[float]) -> str:
    """Write what :func:`convert_pvtv2` returned as a sentence."""
    counts = Counter(origins.values())
    return (
        f'{", ".join(f"{counts[origin]} {origin}" for origin in ORIGINS)} of {len(origins)} tensors. '
        'Difference between the outputs of its stages and those of PVTv2, on images not used for '
        f'fitting: {", ".join(f"{difference:.1%}" for difference in differences)}'
    )


class _Converter:
    """State of :func:`convert_pvtv2`: the current maps (B, H, W, C) of both networks."""

    def __init__(self, linglo: Layer, images: Maps, steps: int) -> None:
        self.linglo = linglo
        self.steps = steps
        self.images = images
        self.held_out = max(1, len(images) // 5)
        self.origins = {name: 'new' for name in linglo.state_dict()}
        self.names = {module: name for name, module in linglo.named_modules()}

    @torch.no_grad()
    def convert(self, pvtv2: Layer) -> Tuple[Dict[str, str], List[float]]:
        self._take(self.linglo.patch_embed.conv, pvtv2.patch_embed.proj)
        self._take(self.linglo.patch_embed.norm, pvtv2.patch_embed.norm)
        self.target = [pvtv2.patch_embed(batch) for batch in self.images]
        self.maps = [self.linglo.patch_embed(batch) for batch in self.images]
        differences = []
        for i, (theirs, ours) in enumerate(zip(pvtv2.stages, self.linglo.stages)):
            if i:
                self._downsample(ours.downsample, theirs.downsample, pvtv2.stages[i - 1].norm)
            for j, block in enumerate(ours.blocks):
                # The repetitions of each PVTv2 block follow it.
                index = j * len(theirs.blocks) // len(ours.blocks)
                if j and index == (j - 1) * len(theirs.blocks) // len(ours.blocks):
                    self._repeat(block, ours.blocks[j - 1], theirs.blocks[index])
                else:
                    self._block(block, theirs.blocks[index])
            self.target = [theirs.norm(x) for x in self.target]
            differences.append(self._difference(theirs.norm))
            print_log(f'stage {i} of {len(self.linglo.stages)} converted', logger='current')
        for i in self.linglo.out_indices:
            self._take(getattr(self.linglo, f'norm{i}'), pvtv2.stages[i].norm)
        return self.origins, differences

    def _downsample(self, ours: Layer, theirs: Layer, norm: nn.LayerNorm) -> None:
        self._take(ours.norm, theirs.norm)
        inverse = [(x.var(-1, unbiased=False) + norm.eps).rsqrt().flatten() for x in self.maps]
        spread = 1 / torch.cat(inverse).mean()
        kernel = theirs.proj.weight * norm.weight.view(1, -1, 1, 1)
        ours.conv.weight.copy_((kernel - kernel.mean(1, keepdim=True)) / spread)
        # At the borders, this bias is too large, because PVTv2's padding is 0 after the norm.
        ours.conv.bias.copy_(theirs.proj.bias + theirs.proj.weight.sum((2, 3)) @ norm.bias)
        self._mark(ours.conv, 'derived')
        self.target = [theirs(x.permute(0, 3, 1, 2)) for x in self.target]
        inputs = [x.permute(0, 3, 1, 2) for x in self.maps]
        self._fit(ours, ours.conv, inputs, self.target, learning_rate=1e-3)
        self.maps = [ours(x) for x in inputs]

    def _block(self, ours: Layer, theirs: Layer) -> None:
        self._take(ours.norm1, theirs.norm1)
        self._take(ours.norm2, theirs.norm2)
        self._take(ours.ffn.fc1, theirs.mlp.fc1)
        self._take(ours.ffn.fc2, theirs.mlp.fc2)
        self._start_attention(ours.attn, theirs.attn)
        self.target = [x + _on_tokens(theirs.attn, theirs.norm1(x)) for x in self.target]
        inputs = [ours.norm1(x).flatten(1, 2) for x in self.maps]
        missing = [(x - y).flatten(1, 2) for x, y in zip(self.target, self.maps)]
        self._fit(ours.attn, ours.attn, inputs, missing, learning_rate=5e-3)
        self.maps = [x + ours.attn(tokens).view_as(x) for x, tokens in zip(self.maps, inputs)]
        self._start_encoding(ours, theirs.mlp.dwconv)
        self.target = [x + _on_tokens(theirs.mlp, theirs.norm2(x)) for x in self.target]
        self.maps = [x + ours.ffn(ours.norm2(x)) for x in self.maps]

    def _repeat(self, ours: Layer, before: Layer, theirs: Layer) -> None:
        ours.load_state_dict(before.state_dict())
        self._start_encoding(ours, theirs.mlp.dwconv)
        self._mark(ours, 'repeated')
        for last in (ours.attn.proj, ours.ffn.fc2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self._mark(last, 'new')

    def _start_attention(self, ours: Layer, theirs: Layer) -> None:
        channels = ours.key.in_features
        ours.key.weight.copy_(theirs.kv.weight[channels:])
        ours.key.bias.copy_(theirs.kv.bias[channels:])
        ours.proj.load_state_dict(theirs.proj.state_dict())
        for zero in (ours.saliency, ours.value.weight, ours.mix.bias):
            nn.init.zeros_(zero)
        nn.init.ones_(ours.value.bias)
        nn.init.eye_(ours.mix.weight)
        self._mark(ours.key, 'derived')
        self._mark(ours.proj, 'derived')

    def _start_encoding(self, block: Layer, dwconv: nn.Conv2d) -> None:
        encoding = block.ffn.pos_encoding
        first, *others = encoding.branches
        first.conv.weight.copy_(dwconv.weight)
        if encoding.skip:
            centre = encoding.kernel_size // 2
            first.conv.weight[:, 0, centre, centre] -= 1
        update_bn((block.ffn.fc1(block.norm2(x)).permute(0, 3, 1, 2) for x in self.maps), encoding)
        first.bn.weight.copy_((first.bn.running_var + first.bn.eps).sqrt())
        first.bn.bias.copy_(first.bn.running_mean + dwconv.bias)
        for branch in others:
            nn.init.zeros_(branch.bn.weight)
        self._mark(first, 'derived')

    def _take(self, ours: Layer, theirs: Layer) -> None:
        ours.load_state_dict(theirs.state_dict())
        self._mark(ours, 'taken')

    def _mark(self, layer: Layer, origin: str) -> None:
        for name in layer.state_dict():
            self.origins[f'{self.names[layer]}.{name}'] = origin

    def _difference(self, norm: nn.LayerNorm) -> float:
        pairs = list(zip(self.maps, self.target))[-self.held_out :]
        error = sum((norm(ours) - theirs).square().sum() for ours, theirs in pairs)
        return float((error / sum(theirs.square().sum() for _, theirs in pairs)).sqrt())

    @torch.enable_grad()
    def _fit(
        self, layer: Layer, part: Layer, inputs: Maps, targets: Maps, learning_rate: float
    ) -> None:
        """Fit the parameters of a part of a layer by least squares, with Adam and a cosine schedule."""
        if not self.steps:
            return
        inputs, targets = inputs[: -self.held_out], targets[: -self.held_out]
        size = torch.stack([target.square().mean() for target in targets]).mean()
        optimizer = torch.optim.Adam(part.parameters(), lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        layer.train()
        for step in range(self.steps):
            batch = step % len(inputs)
            layer.zero_grad()
            (F.mse_loss(layer(inputs[batch]), targets[batch]) / size).backward()
            optimizer.step()
            schedule.step()
        layer.zero_grad()
        layer.eval()


def _on_tokens(layer: Layer, x: Tensor) -> Tensor:
    """Apply a layer of PVTv2, which takes tokens, to a map (B, H, W, C)."""
    return layer(x.flatten(1, 2), x.shape[1:3]).view_as(x)


def _check_variant(linglo: LinGlo) -> None:
    wrong = {
        'in_channels': linglo.in_channels != 3,
        'attention': linglo.attention != 'key_only',
        'pos_encoding': linglo.pos_encoding not in ENCODINGS,
        'layout': 'C' in linglo.layout,
        'overlap': not linglo.patch_embed.overlap,
        'qkv_bias': not linglo.qkv_bias,
        'norm_cfg': (linglo.norm_cfg or {}).get('type') not in ('BN', 'SyncBN'),
        'frozen_stages': linglo.frozen_stages >= 0,
        'deploy': linglo.deploy,
    }
    if any(wrong.values()):
        raise CheckpointError(
            'to start from PVTv2, LinGlo needs images of 3 channels, key-only attention, a convolutional positional '
            'encoding with batch norms, overlapping patches, biases, no frozen stage, and its '
            f'training form; drop {", ".join(k for k, v in wrong.items() if v)} from the config'
        )

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Iterator, List, Optional, Sequence, Tuple, Union

import torch
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule, constant_init, normal_init, trunc_normal_init
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mmlinglo.registry import MODELS
from mmlinglo.utils.checkpoint import load_pretrained_backbone

from ..layers import ConditionalPositionalEncoding, KeyOnlyAttention

LayerNorm = partial(nn.LayerNorm, eps=1e-6)  # PVT's epsilon


class PatchEmbed(nn.Module):
    """Down-sampling convolution and LayerNorm (paper Sec. 3.3), (B, C, H, W) to (B, H', W', C')."""

    def __init__(
        self, in_channels: int, embed_dims: int, kernel_size: int, stride: int, padding: int
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, embed_dims, kernel_size, stride, padding)
        self.norm = LayerNorm(embed_dims)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


class FFN(nn.Module):
    """Feed-forward network with the positional encoding inside (paper Fig. 2), on (B, H, W, C)."""

    def __init__(
        self, embed_dims: int, feedforward_channels: int, norm_cfg: Optional[dict], deploy: bool
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dims, feedforward_channels)
        self.pos_encoding = ConditionalPositionalEncoding(
            feedforward_channels, norm_cfg=norm_cfg, deploy=deploy
        )
        self.act = nn.GELU()
        self.fc2 = nn.Linear(feedforward_channels, embed_dims)

    def forward(self, x: Tensor) -> Tensor:
        # A (B, H, W, C) tensor permuted to (B, C, H, W) is a channels-last map: no copy.
        x = self.pos_encoding(self.fc1(x).permute(0, 3, 1, 2))
        return self.fc2(self.act(x.permute(0, 2, 3, 1)))


class LinGloBlock(nn.Module):
    """Pre-norm encoder block (paper Fig. 3b), (B, H, W, C) to (B, H, W, C)."""

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path: float,
        norm_cfg: Optional[dict],
        deploy: bool,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(embed_dims)
        self.attn = KeyOnlyAttention(embed_dims, num_heads, qkv_bias)
        self.norm2 = LayerNorm(embed_dims)
        self.ffn = FFN(embed_dims, int(embed_dims * mlp_ratio), norm_cfg, deploy)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x).flatten(1, 2)).view_as(x))
        return x + self.drop_path(self.ffn(self.norm2(x)))


class LinGloStage(nn.Module):
    """Encoder blocks at one resolution, after a down-sampling layer in all stages but the first."""

    def __init__(
        self, downsample: Optional[PatchEmbed], blocks: List[LinGloBlock], with_cp: bool
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C_in) to (B, ceil(H/2), ceil(W/2), C), or keep the size without a downsample."""
        if self.downsample is not None:
            x = self.downsample(x.permute(0, 3, 1, 2))
        for block in self.blocks:
            if self.with_cp and x.requires_grad:
                x = checkpoint(
                    block,
                    x,
                    use_reentrant=False,
                    context_fn=lambda block=block: (nullcontext(), _keep_running_stats(block)),
                )
            else:
                x = block(x)
        return x


@MMENGINE_MODELS.register_module()
@MODELS.register_module()
class LinGlo(BaseModule):
    """LinGlo backbone: key-only attention and convolution alternating in every stage.

    `Rethinking Query-Key Pairwise Interactions in Vision Transformers
    <https://arxiv.org/abs/2207.00188>`_, Sec. 3.3, 3.4 and Fig. 3. No position
    embedding, hence no fixed input size.

    The paper gives no LayerNorm epsilon and no bias flags: 1e-6 and biases
    everywhere are PVT's choices, on which the paper builds.

    Args:
        arch: ``'b0'``, ``'b1'``, ``'b2'`` (Sec. 3.4), or a dict with the keys
            ``embed_dims``, ``depths``, ``num_heads`` and ``mlp_ratio``, each a
            sequence with one entry per stage.
        in_channels: Channels of the images.
        drop_path_rate: Stochastic depth rate of the last block; it grows
            linearly from 0 at the first block.
        out_indices: Stage numbers, from 0, whose maps are returned; negative
            ones count from the end. Stages after the last of them are not built
            and each entry has a LayerNorm of its own, so that every parameter
            takes part in the output.
        frozen_stages: -1 freezes nothing, 0 the stem, k the stem and the first
            k stages with their output norms. Frozen parts stay in evaluation
            mode and without gradients.
        qkv_bias: Whether keys and values have a bias.
        norm_cfg: Norm of the branches of the positional encodings.
        norm_eval: Whether batch norms stay in evaluation mode, with fixed
            statistics, also in training.
        with_cp: Whether to recompute the blocks in the backward pass, which
            costs time and saves memory. Running statistics are updated once.
        deploy: Whether to build the re-parameterised form, see
            :meth:`switch_to_deploy`.
        init_cfg: Initialization config. ``dict(type='Pretrained',
            checkpoint=..., prefix='backbone.')`` is strict, see
            :meth:`init_weights`. None for the paper's initialization.

    Raises:
        ValueError: If ``arch``, ``out_indices``, ``frozen_stages`` or
            ``drop_path_rate`` is out of range.

    Example:
        >>> import torch
        >>> from mmlinglo import LinGlo
        >>> model = LinGlo(arch='b0').eval()
        >>> for feature_map in model(torch.rand(1, 3, 224, 224)):
        ...     print(tuple(feature_map.shape))
        (1, 32, 56, 56)
        (1, 64, 28, 28)
        (1, 160, 14, 14)
        (1, 256, 7, 7)
    """

    arch_zoo = {
        'b0': dict(
            embed_dims=(32, 64, 160, 256),
            depths=(2, 3, 3, 2),
            num_heads=(1, 2, 5, 8),
            mlp_ratio=(8, 8, 4, 4),
        ),
        'b1': dict(
            embed_dims=(64, 128, 320, 512),
            depths=(2, 3, 3, 2),
            num_heads=(1, 2, 5, 8),
            mlp_ratio=(8, 8, 4, 4),
        ),
        'b2': dict(
            embed_dims=(64, 128, 320, 512),
            depths=(3, 5, 9, 3),
            num_heads=(1, 2, 5, 8),
            mlp_ratio=(8, 8, 4, 4),
        ),
    }

    def __init__(
        self,
        arch: Union[str, dict] = 'b0',
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        out_indices: Union[int, Sequence[int]] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        qkv_bias: bool = True,
        norm_cfg: Optional[dict] = dict(type='BN'),  # noqa: B006
        norm_eval: bool = False,
        with_cp: bool = False,
        deploy: bool = False,
        init_cfg: Union[dict, List[dict], None] = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        arch = self._parse_arch(arch)
        self.arch = arch
        embed_dims, depths = arch['embed_dims'], arch['depths']
        num_stages = len(depths)
        if not -1 <= frozen_stages <= num_stages:
            raise ValueError(f'frozen_stages must be in [-1, {num_stages}], got {frozen_stages}')
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate must be in [0, 1), got {drop_path_rate}')
        self.out_indices = self._parse_out_indices(out_indices, num_stages)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.deploy = deploy

        drop_paths = torch.linspace(0, drop_path_rate, sum(depths)).split(list(depths))
        self.patch_embed = PatchEmbed(
            in_channels, embed_dims[0], kernel_size=7, stride=4, padding=3
        )
        self.stages = nn.ModuleList()
        for i in range(max(self.out_indices) + 1):
            downsample = PatchEmbed(
                embed_dims[i - 1], embed_dims[i], kernel_size=3, stride=2, padding=1
            )
            blocks = [
                LinGloBlock(
                    embed_dims[i],
                    arch['num_heads'][i],
                    arch['mlp_ratio'][i],
                    qkv_bias=qkv_bias,
                    drop_path=float(drop_path),
                    norm_cfg=norm_cfg,
                    deploy=deploy,
                )
                for drop_path in drop_paths[i]
            ]
            self.stages.append(LinGloStage(downsample if i else None, blocks, with_cp))
        for i in self.out_indices:
            self.add_module(f'norm{i}', LayerNorm(embed_dims[i]))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # All maps are channels-last, and so are the gradients of the kernels: with kernels
                # of the same layout DistributedDataParallel need not copy them.
                module.weight.data = module.weight.data.clone(memory_format=torch.channels_last)
        self._freeze_stages()

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Extract feature maps.

        Args:
            x: Normalized images, (B, in_channels, H, W), of any H and W >= 32.

        Returns:
            One (B, C_i, ceil(H / s_i), ceil(W / s_i)) map per entry of
            ``out_indices``, in its order, with strides s = 4, 8, 16, 32.

        Raises:
            ValueError: If H or W is below 32.
        """
        if min(x.shape[-2:]) < 32:
            raise ValueError(
                f'images must be at least 32 pixels high and wide, got a batch of shape '
                f'{tuple(x.shape)}: resize or pad them'
            )
        x = self.patch_embed(x)
        outs = {}
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                outs[i] = getattr(self, f'norm{i}')(x).permute(0, 3, 1, 2)
        return tuple(outs[i] for i in self.out_indices)

    def train(self, mode: bool = True) -> 'LinGlo':
        """Set the mode, except that frozen parts and, with ``norm_eval``, norms stay in evaluation."""
        super().train(mode)
        self._freeze_stages()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def switch_to_deploy(self) -> None:
        """Fuse each positional encoding into one convolution; outputs agree to rounding.

        The state dict then loads into ``LinGlo(..., deploy=True)``. A second
        call does nothing.

        Raises:
            RuntimeError: In training mode.
            TypeError: If the encodings' norm is no batch norm.
        """
        if self.deploy:
            return
        if self.training:
            raise RuntimeError('switch_to_deploy() needs evaluation mode: call model.eval() first')
        for module in self.modules():
            if isinstance(module, ConditionalPositionalEncoding):
                module.switch_to_deploy()
        self.deploy = True

    def init_weights(self) -> None:
        """Initialize as the paper does, then apply ``init_cfg``.

        Linear layers: truncated normal of std 0.02; convolutions: normal by
        fan-out, as in PVT; norms: identity.

        A ``Pretrained`` entry of ``init_cfg`` must provide every tensor of the
        backbone, except the output norms of stages that the source did not
        return. The numbers are logged.

        Raises:
            FileNotFoundError: If the pretrained file is missing.
            CheckpointError: If it lacks backbone tensors or has other shapes.
        """
        for module in self.modules():
            _init_layer(module)
        init_cfgs = [self.init_cfg] if isinstance(self.init_cfg, dict) else self.init_cfg or []
        pretrained = [cfg for cfg in init_cfgs if cfg['type'] == 'Pretrained']
        others = [cfg for cfg in init_cfgs if cfg['type'] != 'Pretrained']
        if others:
            self.init_cfg = others
            super().init_weights()
            self.init_cfg = init_cfgs
        for cfg in pretrained:
            load_pretrained_backbone(self, cfg['checkpoint'], cfg.get('prefix'))

    def _freeze_stages(self) -> None:
        frozen = [self.patch_embed] if self.frozen_stages >= 0 else []
        for i in range(min(self.frozen_stages, len(self.stages))):
            frozen.append(self.stages[i])
            if i in self.out_indices:
                frozen.append(getattr(self, f'norm{i}'))
        for module in frozen:
            module.eval()
            module.requires_grad_(False)

    @classmethod
    def _parse_arch(cls, arch: Union[str, dict]) -> dict:
        if isinstance(arch, str):
            if arch not in cls.arch_zoo:
                raise ValueError(
                    f'arch must be one of {list(cls.arch_zoo)} or a dict, got {arch!r}'
                )
            return cls.arch_zoo[arch]
        keys = {'embed_dims', 'depths', 'num_heads', 'mlp_ratio'}
        if set(arch) != keys or len({len(values) for values in arch.values()}) != 1:
            raise ValueError(
                f'arch must be a dict of equally long sequences with the keys {sorted(keys)}, '
                f'got {dict(arch)}'
            )
        return {key: tuple(values) for key, values in arch.items()}

    @staticmethod
    def _parse_out_indices(
        out_indices: Union[int, Sequence[int]], num_stages: int
    ) -> Tuple[int, ...]:
        given = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
        indices = tuple(i + num_stages if i < 0 else i for i in given)
        if not indices or len(set(indices)) != len(indices):
            raise ValueError(f'out_indices must be distinct and at least one, got {out_indices}')
        if not all(0 <= i < num_stages for i in indices):
            raise ValueError(
                f'out_indices must be stage numbers in [-{num_stages}, {num_stages - 1}], '
                f'got {out_indices}'
            )
        return indices


def _init_layer(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_init(module, std=0.02)
    elif isinstance(module, nn.Conv2d):
        kernel_height, kernel_width = module.kernel_size
        fan_out = kernel_height * kernel_width * module.out_channels // module.groups
        normal_init(module, std=(2.0 / fan_out) ** 0.5)
    elif isinstance(module, (nn.LayerNorm, _BatchNorm)):
        constant_init(module, 1)
    elif isinstance(module, KeyOnlyAttention):
        nn.init.trunc_normal_(module.saliency, std=0.02)


@contextmanager
def _keep_running_stats(module: nn.Module) -> Iterator[None]:
    """Keep batch norms in training mode from updating their statistics a second time.

    By a momentum of 0 and not through ``track_running_stats``, which would
    change what autograd saves and so break the recomputation.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, num_batches_tracked) in zip(norms, before):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(num_batches_tracked)

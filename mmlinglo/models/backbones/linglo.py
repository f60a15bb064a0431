# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from contextlib import nullcontext
from math import inf
from numbers import Integral
from typing import Any, List, Optional, Sequence, Tuple, Union

import torch
from mmengine.model import (
    BaseModule,
    PretrainedInit,
    constant_init,
    normal_init,
    trunc_normal_init,
)
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mmlinglo.registry import MODELS
from mmlinglo.utils.checkpoint import load_pretrained_backbone

from ..arguments import check_integer, is_number
from ..data_preprocessors import IMAGE_SIZES
from ..layers import (
    FFN,
    AbsolutePositionEmbedding,
    ConditionalPositionalEncoding,
    ConvBlock,
    DotProductAttention,
    HybridBlock,
    KeyOnlyAttention,
    LayerNorm,
    PatchEmbed,
    zero_outside,
)

ATTENTIONS = {'key_only': KeyOnlyAttention, 'dot_product': DotProductAttention}
CONDITIONAL_ENCODINGS = {  # paper Table 6
    'CPE': dict(num_branches=1, skip=False),
    'R-CPE': dict(num_branches=1, skip=True),
    'P-CPE': dict(num_branches=4, skip=False),
    'RP-CPE': dict(num_branches=4, skip=True),
}
ImageSizes = Sequence[Tuple[int, int]]
POS_ENCODINGS = (*CONDITIONAL_ENCODINGS, 'absolute', None)


class LinGloStage(nn.Module):
    """Blocks at one resolution, after a down-sampling layer and a position embedding if there are any."""

    def __init__(
        self,
        downsample: Optional[PatchEmbed],
        pos_embed: Optional[AbsolutePositionEmbedding],
        blocks: List[nn.Module],
        with_cp: bool,
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.pos_embed = pos_embed
        self.blocks = nn.ModuleList(blocks)
        self.with_cp = with_cp

    def forward(self, x: Tensor, outside: Optional[Tensor] = None) -> Tensor:
        """Map (B, H, W, C_in) to (B, ceil(H / s), ceil(W / s), C) with the downsample's stride s or 1.

        ``outside`` are those of the result's positions that lie outside of their image,
        (B, ceil(H / s), ceil(W / s), 1) bool, and become zeros; None if there are none.
        """
        if self.downsample is not None:
            x = self.downsample(x.permute(0, 3, 1, 2))
        if self.pos_embed is not None:
            x = self.pos_embed(x)
        mask = () if outside is None else (outside,)
        for block in self.blocks:
            if self.with_cp and x.requires_grad:
                x = checkpoint(
                    block,
                    x,
                    *mask,
                    use_reentrant=False,
                    context_fn=lambda block=block: (nullcontext(), _KeepRunningStats(block)),
                )
            else:
                x = block(x, *mask)
        return zero_outside(x, outside)


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
        arch: ``'b0'``, ``'b1'``, ``'b2'`` (Sec. 3.4); ``'b3'``, ``'b4'``,
            ``'b5'``, larger ones that are not the paper's: the widths and depths
            of PVTv2-B3, B4, B5; or a dict with the keys ``embed_dims``,
            ``depths``, ``num_heads`` and ``mlp_ratio``, each a sequence with one
            entry per stage, and optionally ``strides`` (4, then 2 each; a
            later stage of stride 1 has no down-sampling layer).
        in_channels: Channels of the images.
        drop_path_rate: Stochastic depth rate of the last block; it grows
            linearly from 0 at the first block.
        attention: ``'key_only'``, or ``'dot_product'`` for the standard multi-head
            kind (Sec. 5.2), quadratic in the image size.
        pos_encoding: ``'RP-CPE'``, or another row of Table 6, ``'P-CPE'``,
            ``'R-CPE'``, ``'CPE'``; ``'absolute'`` for a learned embedding per stage
            (Sec. 5.4); None for none.
        layout: One letter per stage (Table 5): H for hybrid blocks, C for
            convolutional ones with squeeze-and-excitation, as in ``'C-C-H-H'``.
            None for hybrid blocks in all stages.
        overlap: Whether the down-sampling kernels overlap; False for the
            patches of ViT and PVT (Sec. 5.4).
        img_size: Height and width in pixels of the images for which
            ``pos_encoding='absolute'`` is learned; others get it resized.
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
        mask_padding: Whether an image's features are to be the same however far its
            batch pads it: positions outside of the image get no saliency weight and
            are zeros to every convolution. Not so in the paper. It needs the images'
            sizes, see :meth:`forward`, and no convolutional blocks and no absolute
            embedding. Batch norms in training still count the padding, as zeros.
        with_cp: Whether to recompute the blocks in the backward pass, which
            costs time and saves memory. Running statistics are updated once.
        channels_last: Whether the maps returned keep the channels-last layout in which
            they are computed, which spares a copy of each. False for contiguous
            maps: compiled operators of mmcv, RoIAlign among them, read any other
            layout wrongly, without an error.
        deploy: Whether to build the re-parameterised form, see
            :meth:`switch_to_deploy`.
        init_cfg: Initialization config. ``dict(type='Pretrained',
            checkpoint=..., prefix='backbone.')`` is strict, see
            :meth:`init_weights`. None for the paper's initialization.

    Raises:
        ValueError: If an argument is not among what is allowed.
        TypeError: If an argument is of a type that never is.

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
        'b3': dict(
            embed_dims=(64, 128, 320, 512),
            depths=(3, 4, 18, 3),
            num_heads=(1, 2, 5, 8),
            mlp_ratio=(8, 8, 4, 4),
        ),
        'b4': dict(
            embed_dims=(64, 128, 320, 512),
            depths=(3, 8, 27, 3),
            num_heads=(1, 2, 5, 8),
            mlp_ratio=(8, 8, 4, 4),
        ),
        'b5': dict(
            embed_dims=(64, 128, 320, 512),
            depths=(3, 6, 40, 3),
            num_heads=(1, 2, 5, 8),
            mlp_ratio=(4, 4, 4, 4),
        ),
    }

    def __init__(
        self,
        arch: Union[str, dict] = 'b0',
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        attention: str = 'key_only',
        pos_encoding: Optional[str] = 'RP-CPE',
        layout: Optional[str] = None,
        overlap: bool = True,
        img_size: int = 224,
        out_indices: Union[int, Sequence[int]] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        qkv_bias: bool = True,
        norm_cfg: Optional[dict] = dict(type='BN'),  # noqa: B006
        norm_eval: bool = False,
        mask_padding: bool = False,
        with_cp: bool = False,
        channels_last: bool = False,
        deploy: bool = False,
        init_cfg: Union[dict, List[dict], None] = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        self.arch = self._parse_arch(arch)
        embed_dims, depths, strides = (self.arch[k] for k in ('embed_dims', 'depths', 'strides'))
        num_stages = len(depths)
        check_integer('in_channels', in_channels, 1)
        check_integer('img_size', img_size, 1)
        check_integer('frozen_stages', frozen_stages, -1, num_stages)
        if not is_number(drop_path_rate):
            raise TypeError(f'drop_path_rate must be a number in [0, 1), got {drop_path_rate!r}')
        flags = dict(
            overlap=overlap,
            qkv_bias=qkv_bias,
            norm_eval=norm_eval,
            mask_padding=mask_padding,
            with_cp=with_cp,
            channels_last=channels_last,
            deploy=deploy,
        )
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise TypeError(f'{name} must be True or False, got {flag!r}')
        if norm_cfg is not None and not (isinstance(norm_cfg, dict) and 'type' in norm_cfg):
            raise TypeError(
                f"norm_cfg must be None or a dict with the key 'type', got {norm_cfg!r}"
            )
        if attention not in list(ATTENTIONS):
            raise ValueError(f'attention must be one of {list(ATTENTIONS)}, got {attention!r}')
        if pos_encoding not in POS_ENCODINGS:
            raise ValueError(f'pos_encoding must be one of {POS_ENCODINGS}, got {pos_encoding!r}')
        self.layout = self._parse_layout(layout, num_stages)
        if 'C' in self.layout and pos_encoding not in CONDITIONAL_ENCODINGS:
            raise ValueError(
                f'layout {layout!r} has convolutional blocks, whose convolution is pos_encoding: it '
                f'must be one of {list(CONDITIONAL_ENCODINGS)}, got {pos_encoding!r}'
            )
        if mask_padding and ('C' in self.layout or pos_encoding == 'absolute'):
            raise ValueError(
                'mask_padding=True does not go with convolutional blocks, whose excitation averages '
                f"over the padded map, nor with pos_encoding='absolute', which is stretched over it; "
                f'got layout={layout!r}, pos_encoding={pos_encoding!r}'
            )
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate must be in [0, 1), got {drop_path_rate}')
        self.in_channels = in_channels
        self.attention = attention
        self.pos_encoding = pos_encoding
        self.qkv_bias = qkv_bias
        self.norm_cfg = norm_cfg
        self.out_indices = self._parse_out_indices(out_indices, num_stages)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.mask_padding = mask_padding
        self.channels_last = channels_last
        self.deploy = deploy

        num_blocks = sum(depths)
        drop_paths = (drop_path_rate * i / max(num_blocks - 1, 1) for i in range(num_blocks))
        self.patch_embed = PatchEmbed(in_channels, embed_dims[0], strides[0], overlap)
        self.stages = nn.ModuleList()
        size = img_size
        for i in range(max(self.out_indices) + 1):
            downsample = pos_embed = None
            size = -(-size // strides[i])
            if i and strides[i] > 1:
                downsample = PatchEmbed(embed_dims[i - 1], embed_dims[i], strides[i], overlap)
            if pos_encoding == 'absolute':
                pos_embed = AbsolutePositionEmbedding(embed_dims[i], size)
            blocks = [self._build_block(i, next(drop_paths)) for _ in range(depths[i])]
            self.stages.append(LinGloStage(downsample, pos_embed, blocks, with_cp))
        for i in self.out_indices:
            self.add_module(f'norm{i}', LayerNorm(embed_dims[i]))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # All maps are channels-last, and so are the gradients of the kernels: with kernels
                # of the same layout DistributedDataParallel need not copy them.
                module.weight.data = module.weight.data.clone(memory_format=torch.channels_last)
        self._freeze_stages()

    def forward(self, x: Tensor, image_sizes: Optional[ImageSizes] = None) -> Tuple[Tensor, ...]:
        """Extract feature maps.

        Args:
            x: Normalized images, (B, in_channels, H, W), of any H and W >= 32.
            image_sizes: Height and width in pixels of each image before the padding
                that its batch put to its right and below it. Used with
                ``mask_padding`` only. None for what the data preprocessors
                ``mmlinglo.SizedDetDataPreprocessor`` and
                ``mmlinglo.SizedSegDataPreProcessor`` have left at ``x``.

        Returns:
            One (B, C_i, ceil(H / s_i), ceil(W / s_i)) map per entry of
            ``out_indices``, in its order, with s = 4, 8, 16, 32 in the paper's
            sizes (the products of ``arch['strides']``). With ``mask_padding`` the
            first ceil(h / s_i) rows and ceil(w / s_i) columns of an image of h x w
            pixels are those of the image alone.

        A batch without images has maps without images. In training it is an error:
        batch norms would take statistics of nothing.

        Raises:
            ValueError: If the shape is another one, H or W is below 32, there are no
                images in training, or the image sizes are needed and missing, or do
                not fit.
            TypeError: If ``x`` is no tensor of floating-point numbers.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f'images must be a tensor of normalized, floating-point pixels, got {found}'
            )
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f'images must be of shape (B, {self.in_channels}, H, W), got {tuple(x.shape)}'
            )
        if self.training and x.shape[0] == 0:
            raise ValueError(
                f'training needs images, got a batch of shape {tuple(x.shape)}: its batch norms '
                'have nothing to take statistics of'
            )
        if min(x.shape[-2:]) < 32:
            raise ValueError(
                f'images must be at least 32 pixels high and wide, got a batch of shape '
                f'{tuple(x.shape)}: resize or pad them'
            )
        masks = [None] * len(self.stages)
        if self.mask_padding:
            image_mask, *masks = self._padding_masks(x, image_sizes)
            x = zero_outside(x.permute(0, 2, 3, 1), image_mask).permute(0, 3, 1, 2)
        x = self.patch_embed(x)
        outs = {}
        for i, (stage, outside) in enumerate(zip(self.stages, masks)):
            x = stage(x, outside)
            if i in self.out_indices:
                out = getattr(self, f'norm{i}')(x).permute(0, 3, 1, 2)
                # Not by contiguous(), which leaves maps of 1 x 1 with the strides of channels-last.
                if not self.channels_last:
                    out = out.clone(memory_format=torch.contiguous_format)
                outs[i] = out
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
        """Prepare for evaluation all that can be; outputs agree to rounding.

        Each positional encoding becomes one convolution, and the attentions
        compute their products of weights. The state dict then loads into
        ``LinGlo(..., deploy=True)``. A second call does nothing.

        Raises:
            RuntimeError: In training mode.
            TypeError: If the encodings' norm is no batch norm.
        """
        if self.deploy:
            return
        if self.training:
            raise RuntimeError('switch_to_deploy() needs evaluation mode: call model.eval() first')
        for module in self.modules():
            if isinstance(module, (ConditionalPositionalEncoding, KeyOnlyAttention)):
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
        strict = ('Pretrained', PretrainedInit)  # the class in pure Python configs
        pretrained = [cfg for cfg in init_cfgs if cfg['type'] in strict]
        others = [cfg for cfg in init_cfgs if cfg['type'] not in strict]
        if others:
            self.init_cfg = others
            super().init_weights()
            self.init_cfg = init_cfgs
        for cfg in pretrained:
            load_pretrained_backbone(self, cfg['checkpoint'], cfg.get('prefix'))

    def get_layer_depth(self, param_name: str, prefix: str = '') -> Tuple[int, int]:
        """Depth of a parameter, for layer-wise learning rates.

        Args:
            param_name: Name of the parameter in the whole model.
            prefix: Name of the backbone in it, such as ``'backbone.'``.

        Returns:
            The parameter's layer and the number of layers. Layer 0 is the stem;
            each block is a layer, the first one of a stage together with what
            precedes it; the last layer is all that follows the blocks: output
            norms and whatever has not the prefix.
        """
        num_layers = sum(len(stage.blocks) for stage in self.stages) + 2
        names = param_name[len(prefix) :].split('.')
        if param_name.startswith(prefix) and names[0] == 'patch_embed':
            return 0, num_layers
        if param_name.startswith(prefix) and names[0] == 'stages':
            depth = 1 + sum(len(stage.blocks) for stage in self.stages[: int(names[1])])
            return depth + (int(names[3]) if names[2] == 'blocks' else 0), num_layers
        return num_layers - 1, num_layers

    def _padding_masks(
        self, x: Tensor, image_sizes: Optional[ImageSizes]
    ) -> List[Optional[Tensor]]:
        """Positions outside of their image, (B, H, W, 1) bool, of the input and of each stage.

        None instead of each if no image is padded.
        """
        if image_sizes is None:
            image_sizes = getattr(x, IMAGE_SIZES, None)
        if image_sizes is None:
            raise ValueError(
                'mask_padding=True needs the sizes of the images before padding: set '
                "data_preprocessor.type='mmlinglo.SizedDetDataPreprocessor' (mmdet) or "
                "'mmlinglo.SizedSegDataPreProcessor' (mmseg) in the config, or pass image_sizes"
            )
        height, width = x.shape[-2:]
        sizes = [tuple(int(pixels) for pixels in size) for size in image_sizes]
        if len(sizes) != len(x) or not all(0 < h <= height and 0 < w <= width for h, w in sizes):
            raise ValueError(
                f'image_sizes must be the height and width of each image in a batch of shape '
                f'{tuple(x.shape)}, got {sizes}'
            )
        if all(size == (height, width) for size in sizes):
            return [None] * (len(self.stages) + 1)
        masks, ends = [], torch.tensor(sizes, device=x.device)
        for stride in (1, *self.arch['strides'][: len(self.stages)]):
            height, width, ends = -(-height // stride), -(-width // stride), -(-ends // stride)
            below, right = (
                torch.arange(length, device=x.device) >= end[:, None]
                for length, end in zip((height, width), ends.unbind(1))
            )
            masks.append((below[:, :, None] | right[:, None]).unsqueeze(-1))
        return masks

    def _build_block(self, stage: int, drop_path: float) -> nn.Module:
        embed_dims, mlp_ratio = self.arch['embed_dims'][stage], self.arch['mlp_ratio'][stage]
        channels = int(embed_dims * mlp_ratio)
        encoding = excitation = None
        if self.pos_encoding in CONDITIONAL_ENCODINGS:
            encoding = ConditionalPositionalEncoding(
                channels,
                **CONDITIONAL_ENCODINGS[self.pos_encoding],
                norm_cfg=self.norm_cfg,
                deploy=self.deploy,
            )
        if self.layout[stage] == 'C':
            from torchvision.ops import SqueezeExcitation  # needed here only

            excitation = SqueezeExcitation(channels, round(2 * embed_dims / mlp_ratio))
            return ConvBlock(FFN(embed_dims, channels, encoding, excitation), embed_dims, drop_path)
        attn = ATTENTIONS[self.attention](embed_dims, self.arch['num_heads'][stage], self.qkv_bias)
        if self.deploy and isinstance(attn, KeyOnlyAttention):
            attn.switch_to_deploy()
        return HybridBlock(attn, FFN(embed_dims, channels, encoding), embed_dims, drop_path)

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
            arch = cls.arch_zoo[arch]
        elif not isinstance(arch, dict):
            raise TypeError(f'arch must be one of {list(cls.arch_zoo)} or a dict, got {arch!r}')
        keys = {'embed_dims', 'depths', 'num_heads', 'mlp_ratio'}
        lengths = {_length(values) for values in arch.values()}
        if set(arch) - {'strides'} != keys or len(lengths) != 1 or not all(lengths):
            raise ValueError(
                f'arch must be a dict of equally long sequences with the keys {sorted(keys)} and '
                f'optionally strides, got {dict(arch)}'
            )
        arch = {key: tuple(values) for key, values in arch.items()}
        strides = arch.setdefault('strides', (4,) + (2,) * (len(arch['depths']) - 1))
        for key, lowest in dict(embed_dims=1, depths=0, num_heads=1, strides=1).items():
            for value in arch[key]:
                check_integer(f"each of arch['{key}']", value, lowest)
        for channels, ratio in zip(arch['embed_dims'], arch['mlp_ratio']):
            if not is_number(ratio) or not 1 <= channels * ratio < inf:
                raise ValueError(
                    f"each of arch['mlp_ratio'] must be a number by which embed_dims={channels} "
                    f'gives at least one channel, got {ratio!r}'
                )
        for i in range(1, len(strides)):
            if strides[i] == 1 and arch['embed_dims'][i] != arch['embed_dims'][i - 1]:
                raise ValueError(
                    f'a stage of stride 1 keeps the channels, got arch strides {strides} with '
                    f'embed_dims {arch["embed_dims"]}'
                )
        return arch

    @staticmethod
    def _parse_layout(layout: Optional[str], num_stages: int) -> Tuple[str, ...]:
        letters = ('H',) * num_stages if layout is None else tuple(str(layout).split('-'))
        if len(letters) != num_stages or not set(letters) <= {'C', 'H'}:
            raise ValueError(
                f"layout must name C or H for each of {num_stages} stages, such as 'C-C-H-H', "
                f'got {layout!r}'
            )
        return letters

    @staticmethod
    def _parse_out_indices(
        out_indices: Union[int, Sequence[int]], num_stages: int
    ) -> Tuple[int, ...]:
        given = (out_indices,) if isinstance(out_indices, int) else out_indices
        if _length(given) is None or any(
            isinstance(i, bool) or not isinstance(i, Integral) for i in given
        ):
            raise TypeError(
                'out_indices must be a stage number or a sequence of stage numbers in '
                f'[-{num_stages}, {num_stages - 1}], got {out_indices!r}'
            )
        indices = tuple(i + num_stages if i < 0 else i for i in given)
        if not indices or len(set(indices)) != len(indices):
            raise ValueError(f'out_indices must be distinct and at least one, got {out_indices}')
        if not all(0 <= i < num_stages for i in indices):
            raise ValueError(
                f'out_indices must be stage numbers in [-{num_stages}, {num_stages - 1}], '
                f'got {out_indices}'
            )
        return indices


def _length(values: Any) -> Optional[int]:
    """Length of a list or the like; None for others and for texts."""
    return len(values) if isinstance(values, Sequence) and not isinstance(values, str) else None


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
    elif isinstance(module, AbsolutePositionEmbedding):
        nn.init.trunc_normal_(module.pos_embed, std=0.02)


class _KeepRunningStats:
    """Keep batch norms in training mode from updating their statistics a second time.

    By a momentum of 0 and not through ``track_running_stats``, which would
    change what autograd saves and so break the recomputation. It can be entered
    again, for a second backward pass through the same graph.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]

    def __enter__(self) -> None:
        self.before = [
            (norm, norm.momentum, norm.num_batches_tracked.clone())
            for norm in self.norms
            if norm.track_running_stats
        ]
        for norm, _, _ in self.before:
            norm.momentum = 0.0

    def __exit__(self, *_: object) -> None:
        for norm, momentum, num_batches_tracked in self.before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(num_batches_tracked)

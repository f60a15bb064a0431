# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from itertools import accumulate
from operator import mul
from types import MappingProxyType
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import torch
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule, PretrainedInit
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

from mmlinglo.checkpoint import load_pretrained_backbone
from mmlinglo.registry import MODELS

from .arch import ARCHS, Arch
from .arguments import check_integer, get_length, is_integer, is_number, parse_layout
from .fast import ConditionalPositionalEncoding, FastLinGloNetwork, Rewriting
from .fast.seam import PLAIN_LAYERS, is_switched_on, switch
from .init import init_layer
from .padding import ImageSizes, forward_unpadded

BATCH_NORM = MappingProxyType(dict(type='BN'))
PRETRAINED = ('Pretrained', PretrainedInit)  # the class in pure Python configs
PLAIN_LAYERS.append(SyncBatchNorm)  # mmengine's, type='SyncBN'
# Compiled by torch 2.5, a checkpointed block updates its running statistics twice.
COMPILES_CHECKPOINTS = TorchVersion(torch.__version__) >= (2, 10)


class CheckpointedBlocks(nn.Sequential):
    """Blocks that are computed again in the backward pass, which saves memory."""

    def forward(self, x: Tensor) -> Tensor:
        compiling = torch.compiler.is_compiling()
        for block in self:
            if not x.requires_grad or (compiling and not COMPILES_CHECKPOINTS):
                x = block(x)
            else:
                contexts = partial(_make_contexts, block)
                # What is compiled keeps its running statistics by itself.
                options: Any = {} if compiling else dict(context_fn=contexts)
                x = checkpoint(block, x, use_reentrant=False, **options)
        return x


@MMENGINE_MODELS.register_module()
@MODELS.register_module()
class LinGlo(FastLinGloNetwork, BaseModule):
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
        norm_cfg: Norm of the branches of the positional encodings, ``dict(type='BN')`` by
            default; None for convolutions with a bias and no norm.
        norm_eval: Whether batch norms stay in evaluation mode, with fixed
            statistics, also in training.
        mask_padding: Whether in evaluation an image's features are to be the same however far
            its batch pads it. Images of different sizes are then computed one after another,
            which costs speed. It needs their sizes, see :meth:`forward`. Not so in the paper;
            in training, as there, the padding takes part.
        with_cp: Whether to recompute the blocks in the backward pass, which
            costs time and saves memory. Running statistics are updated once.
            Code that PyTorch before 2.10 has compiled keeps all activations instead.
        channels_last: Whether the maps returned keep the channels-last layout in which
            they are computed, which spares a copy of each. False for contiguous
            maps: compiled operators of mmcv, RoIAlign among them, read any other
            layout wrongly, without an error.
        deploy: Whether to build the re-parameterised form, see
            :meth:`switch_to_deploy`.
        fast: Where exact rewritings of the layers run in place of what the paper writes: None
            for on a CPU only, where they were measured; True for on every device; False for
            nowhere. See also :func:`mmlinglo.literal`.
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

    arch_zoo = ARCHS

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
        norm_cfg: Optional[Mapping] = BATCH_NORM,
        norm_eval: bool = False,
        mask_padding: bool = False,
        with_cp: bool = False,
        channels_last: bool = False,
        deploy: bool = False,
        fast: Optional[bool] = None,
        init_cfg: Union[dict, List[dict], None] = None,
    ) -> None:
        self.arch = Arch.parse(arch)
        num_stages = len(self.arch.depths)
        _check_arguments(num_stages, locals())
        self.layout = parse_layout(layout, num_stages, attention, pos_encoding)
        super().__init__(
            arch=self.arch,
            in_channels=in_channels,
            drop_path_rate=drop_path_rate,
            attention=attention,
            pos_encoding=pos_encoding,
            layout=self.layout,
            overlap=overlap,
            img_size=img_size,
            out_indices=_parse_out_indices(out_indices, num_stages),
            qkv_bias=qkv_bias,
            norm_layer=None if norm_cfg is None else partial(_build_norm, dict(norm_cfg)),
        )
        self.init_cfg = deepcopy(init_cfg)
        self.in_channels = in_channels
        self.attention = attention
        self.pos_encoding = pos_encoding
        self.qkv_bias = qkv_bias
        self.norm_cfg = None if norm_cfg is None else dict(norm_cfg)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.mask_padding = mask_padding
        self.channels_last = channels_last
        self.deploy = False
        strides = list(accumulate(self.arch.strides[: len(self.stages)], mul))
        self.out_strides = tuple(strides[i] for i in self.out_indices)
        self.min_size = strides[-1]
        if with_cp:
            for stage in self.stages:
                stage.blocks = CheckpointedBlocks(*stage.blocks.children())
        for module in self.modules():
            if isinstance(module, Rewriting):
                module.fast = fast
            elif isinstance(module, nn.Conv2d) and module.groups > 1:
                # All maps are channels-last, and so are the gradients of the kernels: with kernels
                # of the same layout DistributedDataParallel need not copy them. The few others stay,
                # since torch.nn.utils.prune cannot prune them in that layout.
                module.weight.data = module.weight.data.clone(memory_format=torch.channels_last)
        if deploy:
            self.eval().switch_to_deploy()
            self.train()
        self._freeze_stages()

    def forward(self, x: Tensor, image_sizes: Optional[ImageSizes] = None) -> Tuple[Tensor, ...]:
        """Extract feature maps.

        Args:
            x: Normalized images, (B, in_channels, H, W), of any H and W of at least
                the largest stride, 32 pixels in the paper's sizes.
            image_sizes: Height and width in pixels of each image before the padding
                that its batch put to its right and below it. Used with
                ``mask_padding`` in evaluation only. None for what the data preprocessors
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
            ValueError: If the shape is another one, H or W is too small, there are no
                images in training, or the image sizes are needed and missing, or do
                not fit.
            TypeError: If ``x`` is no tensor of floating-point numbers.
        """
        if not isinstance(x, Proxy):  # torch.fx traces the network, not the checks
            self._check_images(x)
        if self.mask_padding and not self.training:
            maps = forward_unpadded(super().forward, x, image_sizes, self.out_strides)
        else:
            maps = super().forward(x)
        if self.channels_last:
            return maps
        # Not by contiguous(), which leaves maps of 1 x 1 with the strides of channels-last.
        return tuple(out.clone(memory_format=torch.contiguous_format) for out in maps)

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
        """Make one convolution of each positional encoding; outputs agree to rounding.

        The state dict then loads into ``LinGlo(..., deploy=True)``. A second call does nothing.

        Raises:
            RuntimeError: In training mode.
            TypeError: If the encodings' norm is no batch norm.
        """
        if self.training:
            raise RuntimeError('switch_to_deploy() needs evaluation mode: call model.eval() first')
        encodings = [m for m in self.modules() if isinstance(m, ConditionalPositionalEncoding)]
        for encoding in encodings:
            if not encoding.deploy:
                encoding.fused_kernel_and_bias()  # raises before any of them is changed
        for encoding in encodings:
            encoding.switch_to_deploy()
        self.deploy = True

    def init_weights(self) -> None:
        """Initialize as the paper does (:func:`.init.init_layer`), then apply ``init_cfg``.

        A ``Pretrained`` entry of ``init_cfg`` must provide every tensor of the
        backbone, except the output norms of stages that the source did not
        return. The numbers are logged.

        Raises:
            FileNotFoundError: If the pretrained file is missing.
            CheckpointError: If it lacks backbone tensors, has other shapes or is of another network.
        """
        self.apply(init_layer)
        init_cfgs = [self.init_cfg] if isinstance(self.init_cfg, dict) else self.init_cfg or []
        pretrained = [cfg for cfg in init_cfgs if cfg['type'] in PRETRAINED]
        others = [cfg for cfg in init_cfgs if cfg['type'] not in PRETRAINED]
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
        depths = self.arch.depths[: len(self.stages)]
        depth = last = sum(depths) + 1
        if param_name.startswith(prefix):
            part, *names = param_name[len(prefix) :].split('.')
            if part == 'patch_embed':
                depth = 0
            elif part == 'stages':
                block = int(names[2]) if names[1] == 'blocks' else 0
                depth = 1 + sum(depths[: int(names[0])]) + block
        return depth, last + 1

    def _check_images(self, x: Tensor) -> None:
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
        if min(x.shape[-2:]) < self.min_size:
            raise ValueError(
                f'images must be at least {self.min_size} pixels high and wide, got a batch of '
                f'shape {tuple(x.shape)}: resize or pad them'
            )

    def _freeze_stages(self) -> None:
        frozen: List[nn.Module] = [self.patch_embed] if self.frozen_stages >= 0 else []
        for i in range(min(self.frozen_stages, len(self.stages))):
            frozen.append(self.stages[i])
            if i in self.out_indices:
                frozen.append(getattr(self, f'norm{i}'))
        for module in frozen:
            module.eval()
            module.requires_grad_(False)


def _build_norm(norm_cfg: dict, channels: int) -> nn.Module:
    return build_norm_layer(norm_cfg, channels)[1]


def _check_arguments(num_stages: int, arguments: Dict[str, Any]) -> None:
    """Refuse wrong constructor arguments, but for those that have a parser of their own."""
    check_integer('in_channels', arguments['in_channels'], 1)
    check_integer('img_size', arguments['img_size'], 1)
    check_integer('frozen_stages', arguments['frozen_stages'], -1, num_stages)
    for name in 'overlap qkv_bias norm_eval mask_padding with_cp channels_last deploy'.split():
        if not isinstance(arguments[name], bool):
            raise TypeError(f'{name} must be True or False, got {arguments[name]!r}')
    if not isinstance(arguments['fast'], (bool, type(None))):
        raise TypeError(f'fast must be None, True or False, got {arguments["fast"]!r}')
    drop_path_rate = arguments['drop_path_rate']
    if not is_number(drop_path_rate):
        raise TypeError(f'drop_path_rate must be a number in [0, 1), got {drop_path_rate!r}')
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f'drop_path_rate must be in [0, 1), got {drop_path_rate}')
    norm_cfg = arguments['norm_cfg']
    if norm_cfg is not None and not (isinstance(norm_cfg, Mapping) and 'type' in norm_cfg):
        raise TypeError(f"norm_cfg must be None or a dict with the key 'type', got {norm_cfg!r}")
    init_cfg = arguments['init_cfg']
    given = [init_cfg] if get_length(init_cfg) is None else init_cfg
    if init_cfg is not None and not all(
        isinstance(cfg, dict)
        and 'type' in cfg
        and (cfg['type'] not in PRETRAINED or cfg.get('checkpoint'))
        for cfg in given
    ):
        raise TypeError(
            "init_cfg must be None, a dict with the key 'type' (and with 'checkpoint', a path or "
            f"URL, if the type is 'Pretrained'), or a list of such dicts, got {init_cfg!r}"
        )


def _parse_out_indices(out_indices: Union[int, Sequence[int]], num_stages: int) -> Tuple[int, ...]:
    given: Any = [out_indices] if get_length(out_indices) is None else out_indices
    message = (
        'out_indices must be a stage number or a sequence of distinct stage numbers, at least one, '
        f'in [-{num_stages}, {num_stages - 1}], got {out_indices!r}'
    )
    if not all(is_integer(i) for i in given):
        raise TypeError(message)
    indices = tuple(int(i) + num_stages if i < 0 else int(i) for i in given)
    exist = all(0 <= i < num_stages for i in indices)
    if not indices or not exist or len(set(indices)) < len(indices):
        raise ValueError(message)
    return indices


def _make_contexts(block: nn.Module) -> Tuple[Any, Any]:
    """Contexts of the forward pass, and of its repetition in the backward pass."""
    return nullcontext(), _Repetition(block)


class _Repetition:
    """Run a block as its forward pass did, but keep norms from updating their statistics again.

    By a momentum of 0 and not through ``track_running_stats``, which would
    change what autograd saves and so break the recomputation. It can be entered
    again, for a second backward pass through the same graph.
    """

    def __init__(self, block: nn.Module) -> None:
        norms = (m for m in block.modules() if isinstance(m, _NormBase))
        self.norms = [norm for norm in norms if norm.track_running_stats]
        self.rewrites = is_switched_on()

    def __enter__(self) -> None:
        self.switch = switch(self.rewrites)
        self.switch.__enter__()
        self.before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in self.norms]
        for norm in self.norms:
            norm.momentum = 0.0

    def __exit__(self, *_: object) -> None:
        for norm, (momentum, num_batches_tracked) in zip(self.norms, self.before):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(num_batches_tracked)
        self.switch.__exit__(None, None, None)

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""LinGlo for timm: ``import mmlinglo.timm``, then ``timm.create_model('linglo_b1', num_classes=10)``.

It needs torch and timm, and none of OpenMMLab's packages. ``checkpoint_path=`` takes classifiers'
checkpoints that ``publish_model.py`` has written; ``pretrained=True`` with
``pretrained_cfg_overlay=dict(file=...)`` also takes backbones of detectors and segmentors.
``timm.create_model`` leaves out arguments that are None: for ``pos_encoding=None``, call
:class:`LinGloClassifier`.
"""

from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

import torch
from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, contiguous_format, nn
from torch.utils.checkpoint import checkpoint

from mmlinglo.models.arch import ARCHS
from mmlinglo.models.arguments import parse_layout
from mmlinglo.models.fast import FastLinGloNetwork
from mmlinglo.models.init import init_layer

Indices = Union[int, List[int], None]
SETTINGS = dict(num_classes=1000, first_conv='backbone.patch_embed.conv', classifier='head.fc')
default_cfgs = generate_default_cfgs({f'linglo_{arch}': SETTINGS for arch in ARCHS})


class LinGloClassifier(nn.Module):
    """LinGlo, global pooling and a linear layer (Sec. 4.1), with the methods of timm's models."""

    def __init__(
        self,
        arch: str = 'b0',
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attention: str = 'key_only',
        pos_encoding: Optional[str] = 'RP-CPE',
        layout: Optional[str] = None,
        **network: Any,  # further arguments of LinGloNetwork
    ) -> None:
        super().__init__()
        sizes = ARCHS[arch]
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = sizes.embed_dims[-1]
        self.grad_checkpointing = False
        self.backbone = FastLinGloNetwork(
            sizes,
            in_chans,
            drop_path_rate,
            attention,
            pos_encoding,
            parse_layout(layout, len(sizes.depths), attention, pos_encoding),
            out_indices=[3],
            **network,
        )
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate)
        self.apply(init_layer)
        self.feature_info = [
            dict(num_chs=channels, reduction=4 * 2**i, module=f'backbone.stages.{i}')
            for i, channels in enumerate(sizes.embed_dims)
        ]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """Map images (B, in_chans, H, W) to the last map and the list of the stages' maps.

        ``indices`` are the last n stages, numbers of stages, or None for all; ``norm`` applies the
        output norm to the last stage's map; ``stop_early`` leaves out stages that nobody asked for.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.feature_info), indices)
        maps = list(self._stage_maps(x, last + 1 if stop_early else None))
        final = self.backbone.norm3(maps[3]) if len(maps) == 4 else maps[-1]
        chosen = [final, *(final if norm and i == 3 else maps[i] for i in taken)]
        nchw = [x.permute(0, 3, 1, 2).clone(memory_format=contiguous_format) for x in chosen]
        return nchw[1:] if intermediates_only else (nchw[0], nchw[1:])

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> List[int]:
        """Remove the stages after the last in ``indices``, and the output norm and the classifier."""
        taken, last = feature_take_indices(len(self.feature_info), indices)
        del self.backbone.stages[last + 1 :]
        if prune_norm or last < 3:
            self.backbone.norm3 = nn.Identity()
        if prune_head:
            self.reset_classifier(0, '')
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to the last map, (B, C, H / 32, W / 32)."""
        return self.forward_intermediates(x, 1)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map the last map to logits (B, num_classes), or to pooled features (B, C)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head.apply(init_layer)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Set whether the backward pass recomputes the stages; running statistics count it twice."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Patterns of parameter names, for layer-wise learning rates."""
        stage = r'^backbone\.stages\.(\d+)'
        fine = [(stage + r'\.blocks\.(\d+)', None), (stage, (0,)), (r'^backbone\.norm', (99999,))]
        return dict(stem=r'^backbone\.patch_embed', blocks=stage if coarse else fine)

    def _stage_maps(self, x: Tensor, stop: Optional[int] = None) -> Iterator[Tensor]:
        x = self.backbone.patch_embed(x)
        for stage in list(self.backbone.stages)[:stop]:
            recompute = self.grad_checkpointing and torch.is_grad_enabled()
            x = checkpoint(stage, x, use_reentrant=False) if recompute else stage(x)
            yield x


def filter_checkpoint(state: Dict[str, Any], model: nn.Module) -> Dict[str, Tensor]:
    """Backbone and classifier of an OpenMMLab checkpoint; the model's own classifier if it has none."""
    state, own = state.get('state_dict', state), model.state_dict()
    # Detectors have an output norm for each stage. Other tensors that do not fit are an error.
    parts = ('backbone.patch_embed.', 'backbone.stages.')
    found = {k: v for k, v in state.items() if k in own or k.startswith(parts)}
    return {**{k: v for k, v in own.items() if k.startswith('head.')}, **found}


def _register(arch: str) -> None:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        features = dict(feature_cls='getter', out_indices=(0, 1, 2, 3))
        kwargs.update(arch=arch, feature_cfg=features, pretrained_filter_fn=filter_checkpoint)
        return build_model_with_cfg(LinGloClassifier, create.__name__, pretrained, **kwargs)

    create.__name__ = f'linglo_{arch}'
    register_model(create)


for _arch in ARCHS:
    _register(_arch)

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Backbones that users choose between: LinGlo and timm's, with what was published about them."""

from dataclasses import dataclass, field
from typing import Dict, Optional, Tuple

import torch
from torch import Tensor, nn

from mmlinglo import LinGlo

TIMM_FUSION = 'timm.utils.model.reparameterize_model, torch.fx folding of conv + BN'
FX_FUSION = 'torch.fx folding of conv + BN'


@dataclass(frozen=True)
class Backbone:
    """A backbone and its published accuracy.

    Attributes:
        label: Its name in tables and figures.
        top1: Published ImageNet-1K top-1 accuracy in percent; None if there is none.
        source: Where it was published, and what should be known about it.
        distilled: Whether it was trained with a teacher, which lifts the accuracy.
        fusion: What makes the form for inference out of the trained one; None
            if they are the same.
        linglo: Arguments of :class:`~mmlinglo.LinGlo`; None for a model of timm.
        image_size: Whether timm builds it for one size of images.
        timm: Further arguments of ``timm.create_model`` for four feature maps.
    """

    label: str
    top1: Optional[float]
    source: str
    distilled: bool = False
    fusion: Optional[str] = None
    linglo: Optional[dict] = None
    image_size: bool = False
    timm: dict = field(default_factory=dict)


def _linglo(arch: str, top1: float) -> Backbone:
    return Backbone(
        f'LinGlo-{arch}',
        top1,
        "LinGlo paper (arXiv 2207.00188), Table 2: its authors' claim, not reproduced here",
        fusion='LinGlo.switch_to_deploy',
        linglo=dict(arch=arch),
    )


PVT_V2 = "PVT v2 (arXiv 2106.13797); table of the authors' code, github.com/whai362/PVT"
SWIFTFORMER = (
    "SwiftFormer (arXiv 2303.15446); table of the authors' code, github.com/Amshaker/SwiftFormer"
)
FASTVIT = (
    "FastViT (arXiv 2303.14189); table of the authors' code, github.com/apple/ml-fastvit, "
    'without distillation; trained and tested at 256 x 256'
)
POOLFORMER = (
    "PoolFormer (arXiv 2111.11418); table of the authors' code, github.com/sail-sg/poolformer"
)
EFFICIENTFORMER_V2 = (
    "EfficientFormerV2 (arXiv 2212.08059); table of the authors' code, "
    'github.com/snap-research/EfficientFormer, 300 epochs'
)
REPVIT = (
    "RepViT (arXiv 2307.09283); table of the authors' code, github.com/THU-MIG/RepViT, 300 epochs"
)
RESNET = 'torchvision, weights IMAGENET1K_V1 (90 epochs)'
SWIN = 'Swin Transformer (arXiv 2103.14030), as cited by the LinGlo paper, Table 2'
CONVNEXT = (
    "ConvNeXt (arXiv 2201.03545); table of the authors' code, github.com/facebookresearch/ConvNeXt"
)

BACKBONES: Dict[str, Backbone] = {
    'linglo_b0': _linglo('b0', 72.5),
    'linglo_b1': _linglo('b1', 79.7),
    'linglo_b2': _linglo('b2', 82.7),
    'linglo_b0_dot_product': Backbone(
        'LinGlo-b0 with dot-product attention',
        None,
        'the comparison of the LinGlo paper, Fig. 4',
        fusion='LinGlo.switch_to_deploy',
        linglo=dict(arch='b0', attention='dot_product'),
    ),
    'pvt_v2_b0': Backbone('PVTv2-B0', 70.5, PVT_V2),
    'pvt_v2_b1': Backbone('PVTv2-B1', 78.7, PVT_V2),
    'pvt_v2_b2': Backbone('PVTv2-B2', 82.0, PVT_V2),
    'swiftformer_xs': Backbone('SwiftFormer-XS', 75.7, SWIFTFORMER, True, FX_FUSION),
    'swiftformer_s': Backbone('SwiftFormer-S', 78.5, SWIFTFORMER, True, FX_FUSION),
    'swiftformer_l1': Backbone('SwiftFormer-L1', 80.9, SWIFTFORMER, True, FX_FUSION),
    'fastvit_t8': Backbone('FastViT-T8 (top-1 at 256)', 76.2, FASTVIT, False, TIMM_FUSION),
    'fastvit_sa12': Backbone('FastViT-SA12 (top-1 at 256)', 80.9, FASTVIT, False, TIMM_FUSION),
    'poolformer_s12': Backbone('PoolFormer-S12', 77.2, POOLFORMER),
    'efficientformerv2_s0': Backbone(
        'EfficientFormerV2-S0', 75.7, EFFICIENTFORMER_V2, True, FX_FUSION, image_size=True
    ),
    'efficientformerv2_s1': Backbone(
        'EfficientFormerV2-S1', 79.0, EFFICIENTFORMER_V2, True, FX_FUSION, image_size=True
    ),
    'efficientformerv2_s2': Backbone(
        'EfficientFormerV2-S2', 81.6, EFFICIENTFORMER_V2, True, FX_FUSION, image_size=True
    ),
    'repvit_m0_9': Backbone('RepViT-M0.9', 78.7, REPVIT, True, TIMM_FUSION),
    'repvit_m1_1': Backbone('RepViT-M1.1', 80.7, REPVIT, True, TIMM_FUSION),
    # the first of its five maps is of stride 2
    'resnet18': Backbone(
        'ResNet18', 69.758, RESNET, False, FX_FUSION, timm=dict(out_indices=(1, 2, 3, 4))
    ),
    'resnet50': Backbone(
        'ResNet50', 76.13, RESNET, False, FX_FUSION, timm=dict(out_indices=(1, 2, 3, 4))
    ),
    'swin_tiny_patch4_window7_224': Backbone('Swin-T', 81.3, SWIN, image_size=True),
    'convnext_tiny': Backbone('ConvNeXt-T', 82.1, CONVNEXT),
}


class PooledBackbone(nn.Module):
    """LinGlo with the global pooling that timm's models have without a classifier."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to features (B, C)."""
        return self.backbone(x)[-1].mean((2, 3))


def build_backbone(
    name: str, shape: Tuple[int, int], maps: bool = False, fused: bool = False
) -> nn.Module:
    """Build a backbone with random weights, in evaluation mode; nothing is downloaded.

    Args:
        name: A key of :data:`BACKBONES`.
        shape: Height and width of the images in pixels.
        maps: Whether it returns four feature maps, of strides 4, 8, 16 and 32,
            rather than the pooled features of a classifier, (B, C).
        fused: Whether to build the form for inference.

    Raises:
        ValueError: If the backbone is unknown or has no fused form.
    """
    if name not in BACKBONES:
        raise ValueError(f'no backbone {name!r}; there are {", ".join(BACKBONES)}')
    backbone = BACKBONES[name]
    if fused and backbone.fusion is None:
        raise ValueError(f'{name!r} has nothing to fuse: build it with fused=False')
    if backbone.linglo is not None:
        model = LinGlo(**backbone.linglo, out_indices=(0, 1, 2, 3) if maps else -1).eval()
        if fused:
            model.switch_to_deploy()
        return model if maps else PooledBackbone(model)
    import timm

    outputs = dict(features_only=True, **backbone.timm) if maps else dict(num_classes=0)
    if backbone.image_size:
        outputs['img_size'] = shape
    model = timm.create_model(name, pretrained=False, **outputs).eval()
    return fuse(model) if fused else model


@torch.no_grad()
def fuse(model: nn.Module) -> nn.Module:
    """Fuse all that can be of a timm model, with the same outputs to rounding.

    timm re-parameterises what it can; then each batch norm that follows a
    convolution is folded into it.

    Args:
        model: In evaluation mode; not to be used any more.
    """
    from timm.layers import BatchNormAct2d
    from timm.utils.model import reparameterize_model
    from torch.fx.experimental.optimization import fuse as fold_norms

    model = reparameterize_model(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, BatchNormAct2d):
            parent, _, child = name.rpartition('.')
            setattr(model.get_submodule(parent), child, _split(module))
        elif hasattr(module, 'get_attention_biases'):
            # Kept from call to call, which a traced module would not do by itself.
            biases = module.get_attention_biases(next(module.parameters()).device)
            module.get_attention_biases = lambda _device, biases=biases: biases
    return fold_norms(model)


def _split(module: nn.Module) -> nn.Sequential:
    """timm's batch norm with activation as two modules, so that the norm is recognized."""
    norm = nn.BatchNorm2d(module.num_features, module.eps).eval()
    norm.load_state_dict(module.state_dict())
    return nn.Sequential(norm, module.drop, module.act)

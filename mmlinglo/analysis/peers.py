# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Backbones to compare with: what was published about them, how to build them, and the paper's tables."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Dict, List, NamedTuple, Optional, Tuple, Union

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmlinglo import LinGlo
from mmlinglo.analysis.complexity import count_forms
from mmlinglo.utils.deploy import build_model


@dataclass(frozen=True)
class Peer:
    """A backbone and its published accuracy.

    Attributes:
        label: Its name in tables and figures.
        top1: Published ImageNet-1K top-1 accuracy in percent; None if there is none.
        source: Where it was published, and what should be known about it.
        distilled: Whether it was trained with a teacher, which lifts the accuracy.
        fused: Whether its form for inference differs from the trained one.
        has_maps: Whether it gives four feature maps of strides 4, 8, 16 and 32.
        image_size: Whether timm builds it for one size of images.
        options: Arguments for four maps of ``timm.create_model``; of a model that timm has not, its config.
    """

    label: str
    top1: Optional[float]
    source: str
    distilled: bool = False
    fused: bool = False
    has_maps: bool = True
    image_size: bool = False
    options: dict = field(default_factory=dict)


CLAIM = "LinGlo paper (arXiv 2207.00188), Table 2: its authors' claim, not reproduced here"
CITED = 'as cited by the LinGlo paper, Table 2'
TABLE = "{}; table of the authors' code, github.com/{}"
PVT_V2 = TABLE.format('PVT v2 (arXiv 2106.13797)', 'whai362/PVT')
SWIFT = TABLE.format('SwiftFormer (arXiv 2303.15446)', 'Amshaker/SwiftFormer')
FASTVIT = TABLE.format('FastViT (arXiv 2303.14189)', 'apple/ml-fastvit') + (
    ', without distillation; trained and tested at 256 x 256'
)
POOLFORMER = TABLE.format('PoolFormer (arXiv 2111.11418)', 'sail-sg/poolformer')
EFFICIENT = TABLE.format('EfficientFormerV2 (arXiv 2212.08059)', 'snap-research/EfficientFormer')
REPVIT = TABLE.format('RepViT (arXiv 2307.09283)', 'THU-MIG/RepViT') + ', 300 epochs'
RESNET = 'torchvision, weights IMAGENET1K_V1 (90 epochs)'
CONVNEXT = TABLE.format('ConvNeXt (arXiv 2201.03545)', 'facebookresearch/ConvNeXt')
# The first of timm's five maps of a ResNet has stride 2.
FROM_STRIDE_4 = dict(out_indices=(1, 2, 3, 4))


def _efficient(size: str, top1: float) -> Peer:
    label, source = f'EfficientFormerV2-{size}', f'{EFFICIENT}, 300 epochs'
    return Peer(label, top1, source, distilled=True, fused=True, image_size=True)


def _pvt(size: str, top1: Optional[float], depths: List[int]) -> Peer:
    source = f'PVT (arXiv 2102.12122), {CITED}' if top1 else 'PVT (arXiv 2102.12122)'
    options = dict(type='mmdet.PyramidVisionTransformer', num_layers=depths)
    return Peer(f'PVT-{size}', top1, source, options=options)


# By timm's names, where timm has them.
PEERS: Dict[str, Peer] = {
    'linglo_b0': Peer('LinGlo-b0', 72.5, CLAIM, fused=True),
    'linglo_b1': Peer('LinGlo-b1', 79.7, CLAIM, fused=True),
    'linglo_b2': Peer('LinGlo-b2', 82.7, CLAIM, fused=True),
    'pvt_v2_b0': Peer('PVTv2-B0', 70.5, PVT_V2),
    'pvt_v2_b1': Peer('PVTv2-B1', 78.7, PVT_V2),
    'pvt_v2_b2': Peer('PVTv2-B2', 82.0, PVT_V2),
    'swiftformer_xs': Peer('SwiftFormer-XS', 75.7, SWIFT, distilled=True, fused=True),
    'swiftformer_s': Peer('SwiftFormer-S', 78.5, SWIFT, distilled=True, fused=True),
    'swiftformer_l1': Peer('SwiftFormer-L1', 80.9, SWIFT, distilled=True, fused=True),
    'fastvit_t8': Peer('FastViT-T8 (at 256)', 76.2, FASTVIT, fused=True),
    'fastvit_sa12': Peer('FastViT-SA12 (at 256)', 80.9, FASTVIT, fused=True),
    'poolformer_s12': Peer('PoolFormer-S12', 77.2, POOLFORMER),
    'efficientformerv2_s0': _efficient('S0', 75.7),
    'efficientformerv2_s1': _efficient('S1', 79.0),
    'efficientformerv2_s2': _efficient('S2', 81.6),
    'repvit_m0_9': Peer('RepViT-M0.9', 78.7, REPVIT, distilled=True, fused=True),
    'repvit_m1_1': Peer('RepViT-M1.1', 80.7, REPVIT, distilled=True, fused=True),
    'resnet18': Peer('ResNet18', 69.758, RESNET, fused=True, options=FROM_STRIDE_4),
    'resnet50': Peer('ResNet50', 76.13, RESNET, fused=True, options=FROM_STRIDE_4),
    'swin_tiny_patch4_window7_224': Peer(
        'Swin-T', 81.3, f'Swin Transformer (arXiv 2103.14030), {CITED}', image_size=True
    ),
    'convnext_tiny': Peer('ConvNeXt-T', 82.1, CONVNEXT),
    'pvt_tiny': _pvt('Tiny', 75.1, [2, 2, 2, 2]),
    'pvt_small': _pvt('Small', None, [3, 4, 6, 3]),
    'twins_pcpvt_small': Peer('Twins-PCPVT-S', None, 'Twins (arXiv 2104.13840)'),
    'twins_svt_small': Peer('Twins-SVT-S', 81.3, f'Twins (arXiv 2104.13840), {CITED}'),
    'deit_tiny_patch16_224': Peer('DeiT-Tiny/16', 72.2, CITED, has_maps=False, image_size=True),
    'deit_small_patch16_224': Peer('DeiT-Small/16', 79.9, CITED, has_maps=False, image_size=True),
    'tnt_s_legacy_patch16_224': Peer('TNT-S', 81.3, CITED, has_maps=False, image_size=True),
    'coatnet_0_224': Peer('CoAtNet-0', 81.6, CITED, fused=True, has_maps=False, image_size=True),
}
DOT_PRODUCT = {
    f'linglo_{arch}_dot_product{suffix}': Peer(
        f'LinGlo-{arch} with dot-product attention{label}', None, 'LinGlo paper, Fig. 4', fused=True
    )
    for arch in ('b0', 'b1', 'b2')
    for suffix, label in (('', ''), ('_materialised', ', N x N matrix in memory'))
}
"""The comparison of the paper's Fig. 4.

PyTorch's ``scaled_dot_product_attention`` chooses a kernel that works in blocks and never has the N x N
matrix of all pairs in memory, as the implementations of 2022 had and the paper's memory curve shows.
``_materialised`` takes the kernel with the matrix.
"""
ALL: Dict[str, Peer] = {**PEERS, **DOT_PRODUCT}


class Plain(nn.Module):
    """A backbone that timm has not: as four maps, or with timm's global pooling of the last."""

    def __init__(self, backbone: nn.Module, maps: bool, materialised: bool = False) -> None:
        super().__init__()
        self.backbone, self.maps, self.materialised = backbone, maps, materialised

    def forward(self, x: Tensor) -> Union[Tensor, List[Tensor]]:
        """Map images (B, 3, H, W) to four maps or features (B, C)."""
        with sdpa_kernel(SDPBackend.MATH) if self.materialised else nullcontext():
            maps = self.backbone(x)
        return list(maps) if self.maps else maps[-1].mean((2, 3))


def build_backbone(
    name: str, shape: Tuple[int, int], maps: bool = False, fused: bool = False
) -> nn.Module:
    """Build a backbone with random weights, in evaluation mode; nothing is downloaded.

    Args:
        name: A key of :data:`ALL`.
        shape: Height and width of the images in pixels.
        maps: Whether it returns four feature maps rather than the pooled features of a classifier, (B, C).
        fused: Whether to build the form for inference.

    Raises:
        ValueError: If the backbone is unknown, or has no fused form or no maps, if these are asked for.
    """
    if name not in ALL:
        raise ValueError(f'no backbone {name!r}; there are {", ".join(ALL)}')
    peer = ALL[name]
    if fused and not peer.fused:
        raise ValueError(f'{name!r} has nothing to fuse: build it with fused=False')
    if maps and not peer.has_maps:
        raise ValueError(f'{name!r} gives no four feature maps: leave it out, or use 224 x 224')
    if name.startswith('linglo'):
        attention = 'dot_product' if 'dot_product' in name else 'key_only'
        indices = (0, 1, 2, 3) if maps else -1
        model = LinGlo(name.split('_')[1], attention=attention, out_indices=indices).eval()
        if fused:
            model.switch_to_deploy()
        return Plain(model, maps, name.endswith('_materialised'))
    if 'type' in peer.options:
        return Plain(MODELS.build(copy.deepcopy(peer.options)), maps).eval()
    import timm

    outputs = dict(features_only=True, **peer.options) if maps else dict(num_classes=0)
    if peer.image_size:
        outputs['img_size'] = shape
    model = timm.create_model(name, pretrained=False, **outputs).eval()
    return fuse(model) if fused else model


@torch.no_grad()
def fuse(model: nn.Module) -> nn.Module:
    """Fuse all that can be of a timm model, with the same outputs to rounding.

    timm re-parameterises what it can; then each batch norm that follows a convolution is folded into it.

    Args:
        model: In evaluation mode; not to be used any more.
    """
    from timm.layers import BatchNormAct2d
    from timm.utils.model import reparameterize_model
    from torch.fx.experimental.optimization import fuse as fold_norms

    model = reparameterize_model(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, BatchNormAct2d):  # two modules, so that the norm is recognized
            norm = nn.BatchNorm2d(module.num_features, module.eps).eval()
            norm.load_state_dict(module.state_dict())
            parent, _, child = name.rpartition('.')
            split = nn.Sequential(norm, module.drop, module.act)
            setattr(model.get_submodule(parent), child, split)
        elif hasattr(module, 'get_attention_biases'):
            # Kept from call to call, which a traced module would not do by itself.
            biases = module.get_attention_biases(next(module.parameters()).device)
            module.get_attention_biases = lambda _device, biases=biases: biases
    return fold_norms(model)


class Task(NamedTuple):
    """One of the paper's three comparisons.

    Attributes:
        title: What the models are, and where the paper's numbers come from.
        config: This package's config, in which backbones are exchanged.
        shape: Height and width in pixels of the image for which operations are counted.
        columns: Keys of the paper's columns and their headings.
        accuracy: Key of the column that is drawn, and its name in the figure.
        paper: The paper's numbers by backbone's label, in the order of its table and columns.
    """

    title: str
    config: str
    shape: Tuple[int, int]
    columns: Dict[str, str]
    accuracy: Tuple[str, str]
    paper: Dict[str, Tuple[float, ...]]


TASKS = {
    'classification': Task(
        title='ImageNet-1K Classification (Paper Table 2)',
        config='imagenet/linglo-b0_8xb128_in1k.py',
        shape=(224, 224),
        columns=dict(paper_params_m='Param(M)', paper_top1='Top-1 Acc(%)'),
        accuracy=('paper_top1', 'Top-1 Accuracy (%)'),
        paper={
            'DeiT-Tiny/16': (5.7, 72.2),
            'LinGlo-b0': (3.4, 72.5),
            'ResNet18': (11.7, 69.8),
            'LambdaNet-50': (15.0, 78.4),
            'PVT-Tiny': (13.2, 75.1),
            'LinGlo-b1': (13.1, 79.7),
            'ResNet50': (25.6, 79.8),
            'DeiT-Small/16': (22.1, 79.9),
            'TNT-S': (23.8, 81.3),
            'Swin-T': (29.0, 81.3),
            'Twins-SVT-S': (24.0, 81.3),
            'Focal-Tiny': (29.1, 82.2),
            'CoAtNet-0': (25.0, 81.6),
            'ConvNeXt-T': (29.0, 82.1),
            'LinGlo-b2': (25.4, 82.7),
        },
    ),
    'detection': Task(
        title='COCO, RetinaNet 1x (Paper Table 3)',
        config='coco/retinanet_linglo-b0_fpn_1x_coco.py',
        shape=(800, 1344),  # 800 x 1333 as the data preprocessor pads it
        columns=dict(
            paper_params_m='Param(M)',
            paper_ap='AP',
            paper_ap50='AP50',
            paper_ap75='AP75',
            paper_ap_s='APS',
            paper_ap_m='APM',
            paper_ap_l='APL',
        ),
        accuracy=('paper_ap', 'Box AP'),
        paper={
            'LinGlo-b0': (13.0, 38.0, 58.3, 40.2, 22.8, 41.2, 49.6),
            'ResNet18': (21.3, 31.8, 49.6, 33.6, 16.3, 34.3, 43.2),
            'PVT-Tiny': (23.0, 36.7, 56.9, 38.9, 22.6, 38.8, 50.0),
            'LinGlo-b1': (23.8, 41.5, 62.4, 44.5, 27.1, 45.4, 53.9),
            'ResNet50': (37.7, 36.3, 55.3, 38.6, 19.3, 40.0, 48.8),
            'PVT-Small': (34.2, 40.4, 61.3, 43.0, 25.0, 42.9, 55.7),
            'Twins-PCPVT-S': (34.4, 43.0, 64.1, 46.0, 27.5, 46.3, 57.3),
            'Twins-SVT-S': (34.3, 42.3, 63.4, 45.2, 26.0, 45.5, 56.5),
            'Swin-T': (38.5, 41.5, 62.1, 44.2, 25.1, 44.9, 55.5),
            'LinGlo-b2': (35.1, 44.7, 65.8, 47.9, 28.0, 48.9, 57.8),
        },
    ),
    'segmentation': Task(
        title='ADE20K, SemanticFPN 40k (Paper Table 4)',
        config='ade20k/fpn_linglo-b0_8xb4-40k_ade20k-512x512.py',
        shape=(512, 512),
        columns=dict(paper_params_m='Param(M)', paper_miou='mIoU(%)'),
        accuracy=('paper_miou', 'mIoU (%)'),
        paper={
            'LinGlo-b0': (7.6, 37.3),
            'ResNet18': (15.5, 32.9),
            'PVT-Tiny': (17.0, 35.7),
            'LinGlo-b1': (17.8, 42.5),
            'ResNet50': (28.5, 36.7),
            'PVT-Small': (28.2, 39.8),
            'Twins-PCPVT-S': (28.4, 44.3),
            'Twins-SVT-S': (28.3, 42.6),
            'Swin-T': (31.9, 41.5),
            'LinGlo-b2': (29.1, 45.2),
        },
    ),
}


def backbone_labels(task: str) -> List[str]:
    """Backbones of a task: the paper's table first, in its order, then the others that can be built."""
    others = [peer.label for peer in PEERS.values() if peer.has_maps or task == 'classification']
    return list(dict.fromkeys([*TASKS[task].paper, *others]))


def build_with_backbone(cfg: Config, label: str, shape: Tuple[int, int]) -> Optional[nn.Module]:
    """Build the model of a task's config with another backbone; None if no package provides that one.

    It has random weights, and is in evaluation mode. The neck takes the backbone's channels; a classifier
    of timm comes whole.

    Args:
        cfg: Config with LinGlo of one of :data:`TASKS`.
        label: Backbone's name, from :func:`backbone_labels`.
        shape: Height and width of the images in pixels.
    """
    name = next((name for name, peer in PEERS.items() if peer.label == label), None)
    if name is None:
        return None
    cfg, peer = copy.deepcopy(cfg), PEERS[name]
    size = dict(img_size=shape) if peer.image_size else {}
    is_classifier, from_timm = cfg.default_scope == 'mmpretrain', 'type' not in peer.options
    if is_classifier and from_timm and not name.startswith('linglo'):
        cfg.model = dict(type='TimmClassifier', model_name=name, pretrained=False, **size)
        return build_model(cfg).eval()
    stages = list(cfg.model.backbone.out_indices)
    with torch.no_grad():
        maps = build_backbone(name, (64, 64), maps=True)(torch.zeros(1, 3, 64, 64))
    # Channels of maps at strides 4 to 32; some of timm's models have them last.
    channels = [max(maps[i].shape[1], maps[i].shape[3]) for i in stages]
    if name.startswith('linglo'):
        backbone = dict(type='mmlinglo.LinGlo', arch=name.split('_')[1], out_indices=stages)
    elif from_timm:
        outputs = [peer.options.get('out_indices', range(4))[i] for i in stages]
        backbone = dict(type='mmpretrain.TIMMBackbone', model_name=name, features_only=True)
        backbone.update(pretrained=False, out_indices=outputs, **size)
    else:
        backbone = dict(**peer.options, out_indices=stages)
    cfg.model.backbone = backbone
    if is_classifier:
        cfg.model.head.in_channels = channels[0]
        cfg.model.train_cfg = None  # the augmentations of batches
    else:
        cfg.model.neck.in_channels = channels
    model = build_model(cfg).eval()

    def channels_first(_module: nn.Module, _inputs: tuple, maps: List[Tensor]) -> Tuple:
        pairs = zip(maps, channels)
        return tuple(x if x.shape[1] == c else x.permute(0, 3, 1, 2) for x, c in pairs)

    model.backbone.register_forward_hook(channels_first)
    return model


def comparison_row(task: str, cfg: Config, label: str) -> dict:
    """A backbone's line in the comparison of a task, with the units in the names.

    What was counted for one image is there if a package provides the backbone, and the paper's numbers
    (``paper_...``) if it is in the paper's table.
    """
    row = dict(task=task, backbone=label)
    model = build_with_backbone(cfg, label, TASKS[task].shape)
    if model is not None:
        for form, found in count_forms(model, TASKS[task].shape).items():
            prefix = '' if form == 'training' else 'deployed_'
            row.update({f'{prefix}params_m': found.params / 1e6})
            row.update({f'{prefix}macs_g': found.macs / 1e9})
    row.update(zip(TASKS[task].columns, TASKS[task].paper.get(label, ())))
    return row

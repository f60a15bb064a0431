# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Backbones to compare with: what was published about them, how to build them, and the paper's tables."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmlinglo import LinGlo
from mmlinglo.analysis.complexity import count_forms
from mmlinglo.models.fast import FFN, ConditionalPositionalEncoding
from mmlinglo.utils.deploy import build_model


@dataclass(frozen=True)
class Peer:
    """A backbone and its published accuracy."""

    label: str  # in tables and figures
    top1: Optional[float]  # published ImageNet-1K accuracy in percent
    source: str  # where it was published, and what should be known about it
    distilled: bool = False  # trained with a teacher, which lifts the accuracy
    fused: bool = False  # its form for inference differs from the trained one
    has_maps: bool = True  # it gives four feature maps, of strides 4, 8, 16 and 32
    image_size: bool = False  # timm builds it for one size of images
    first_map: int = 0  # that of stride 4, of timm's maps
    options: Dict[str, Any] = field(default_factory=dict)  # of its constructor; of timm's for maps


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
EFFICIENT += ', 300 epochs'
REPVIT = TABLE.format('RepViT (arXiv 2307.09283)', 'THU-MIG/RepViT') + ', 300 epochs'
RESNET = 'torchvision, weights IMAGENET1K_V1 (90 epochs)'
SWIN = f'Swin Transformer (arXiv 2103.14030), {CITED}'
CONVNEXT = TABLE.format('ConvNeXt (arXiv 2201.03545)', 'facebookresearch/ConvNeXt')
PVT, TWINS = 'PVT (arXiv 2102.12122)', 'Twins (arXiv 2104.13840)'
TAUGHT: Dict[str, Any] = dict(distilled=True, fused=True)
SIZED_TAUGHT: Dict[str, Any] = dict(TAUGHT, image_size=True)
OF_MMDET = dict(type='mmdet.PyramidVisionTransformer')
DOT_PRODUCT: Dict[str, Any] = dict(fused=True, options=dict(attention='dot_product'))
PLAIN: Dict[str, Any] = dict(options=dict(pos_encoding='CPE', norm_cfg=None))
GETTER = dict(feature_cls='getter')  # gives maps (B, C, H, W), as all others do

# By timm's names, where timm has them.
PEERS: Dict[str, Peer] = {
    'linglo_b0': Peer('LinGlo-b0', 72.5, CLAIM, fused=True),
    'linglo_b1': Peer('LinGlo-b1', 79.7, CLAIM, fused=True),
    'linglo_b2': Peer('LinGlo-b2', 82.7, CLAIM, fused=True),
    'pvt_v2_b0': Peer('PVTv2-B0', 70.5, PVT_V2),
    'pvt_v2_b1': Peer('PVTv2-B1', 78.7, PVT_V2),
    'pvt_v2_b2': Peer('PVTv2-B2', 82.0, PVT_V2),
    'swiftformer_xs': Peer('SwiftFormer-XS', 75.7, SWIFT, **TAUGHT),
    'swiftformer_s': Peer('SwiftFormer-S', 78.5, SWIFT, **TAUGHT),
    'swiftformer_l1': Peer('SwiftFormer-L1', 80.9, SWIFT, **TAUGHT),
    'fastvit_t8': Peer('FastViT-T8 (at 256)', 76.2, FASTVIT, fused=True),
    'fastvit_sa12': Peer('FastViT-SA12 (at 256)', 80.9, FASTVIT, fused=True),
    'poolformer_s12': Peer('PoolFormer-S12', 77.2, POOLFORMER),
    'efficientformerv2_s0': Peer('EfficientFormerV2-S0', 75.7, EFFICIENT, **SIZED_TAUGHT),
    'efficientformerv2_s1': Peer('EfficientFormerV2-S1', 79.0, EFFICIENT, **SIZED_TAUGHT),
    'efficientformerv2_s2': Peer('EfficientFormerV2-S2', 81.6, EFFICIENT, **SIZED_TAUGHT),
    'repvit_m0_9': Peer('RepViT-M0.9', 78.7, REPVIT, **TAUGHT),
    'repvit_m1_1': Peer('RepViT-M1.1', 80.7, REPVIT, **TAUGHT),
    'resnet18': Peer('ResNet18', 69.758, RESNET, fused=True, first_map=1),
    'resnet50': Peer('ResNet50', 76.13, RESNET, fused=True, first_map=1),
    'swin_tiny_patch4_window7_224': Peer('Swin-T', 81.3, SWIN, image_size=True, options=GETTER),
    'convnext_tiny': Peer('ConvNeXt-T', 82.1, CONVNEXT),
    'pvt_tiny': Peer(
        'PVT-Tiny', 75.1, f'{PVT}, {CITED}', options=dict(OF_MMDET, num_layers=[2, 2, 2, 2])
    ),
    'pvt_small': Peer('PVT-Small', None, PVT, options=dict(OF_MMDET, num_layers=[3, 4, 6, 3])),
    'twins_pcpvt_small': Peer('Twins-PCPVT-S', None, TWINS),
    'twins_svt_small': Peer('Twins-SVT-S', 81.3, f'{TWINS}, {CITED}'),
    'deit_tiny_patch16_224': Peer('DeiT-Tiny/16', 72.2, CITED, has_maps=False, image_size=True),
    'deit_small_patch16_224': Peer('DeiT-Small/16', 79.9, CITED, has_maps=False, image_size=True),
    'tnt_s_legacy_patch16_224': Peer('TNT-S', 81.3, CITED, has_maps=False, image_size=True),
    'coatnet_0_224': Peer('CoAtNet-0', 81.6, CITED, fused=True, has_maps=False, image_size=True),
}
VARIANTS: Dict[str, Peer] = {
    f'linglo_{arch}_{name}': Peer(f'LinGlo-{arch} with {label}', None, 'of LinGlo', **how)
    for arch in ('b0', 'b1', 'b2')
    for name, label, how in (
        ('dot_product', 'dot-product attention', DOT_PRODUCT),
        ('dot_product_materialised', 'dot-product attention, N x N matrix in memory', DOT_PRODUCT),
        ('branches', 'RP-CPE as four branches', {}),
        ('plain', 'one convolution without norm for RP-CPE', PLAIN),
        ('mask_padding', 'mask_padding', dict(fused=True, options=dict(mask_padding=True))),
    )
}
"""LinGlo with one thing changed, for the paper's Fig. 4, :mod:`.bars` and :mod:`.padding`.

PyTorch's ``scaled_dot_product_attention`` chooses a kernel that works in blocks and never has the N x N
matrix of all pairs in memory, as the implementations of 2022 had and the paper's memory curve shows.
``_materialised`` takes the kernel with the matrix.
"""
ALL: Dict[str, Peer] = {**PEERS, **VARIANTS}
STAGES = (0, 1, 2, 3)


class Plain(nn.Module):
    """A backbone that timm has not: as a list of maps, or with timm's global pooling of the last."""

    def __init__(self, backbone: nn.Module, maps: bool, materialised: bool = False) -> None:
        super().__init__()
        self.backbone, self.maps, self.materialised = backbone, maps, materialised

    def forward(self, x: Tensor, *sizes: Any) -> Union[Tensor, List[Tensor]]:
        """Map images (B, 3, H, W), and for LinGlo their sizes in the batch, to maps or features (B, C)."""
        with sdpa_kernel(SDPBackend.MATH) if self.materialised else nullcontext():
            maps = self.backbone(x, *sizes)
        return list(maps) if self.maps else maps[-1].mean((2, 3))


def find_peer(name: str, maps: bool = False, fused: bool = False) -> Peer:
    """Look a backbone up.

    Raises:
        ValueError: If it is unknown, or has no maps or no form for inference, if these are asked for.
    """
    if name not in ALL:
        raise ValueError(f'no backbone {name!r}; there are {", ".join(ALL)}')
    if maps and not ALL[name].has_maps:
        raise ValueError(f'{name!r} gives no four feature maps: leave it out, or use 224 x 224')
    if fused and not ALL[name].fused:
        raise ValueError(f'{name!r} has nothing to fuse: build it with fused=False')
    return ALL[name]


def build_backbone(
    name: str, shape: Tuple[int, int], stages: Sequence[int] = (), fused: bool = False
) -> nn.Module:
    """Build a backbone with random weights, in evaluation mode; nothing is downloaded.

    Args:
        name: A key of :data:`ALL`.
        shape: Height and width of the images in pixels.
        stages: Whose maps it returns, some of :data:`STAGES`; none for the pooled features of a
            classifier, (B, C).
        fused: Whether to build the form for inference.

    Raises:
        ValueError: See :func:`find_peer`.
    """
    peer, maps = find_peer(name, bool(stages), fused), bool(stages)
    if name.startswith('linglo'):
        linglo = LinGlo(name.split('_')[1], out_indices=tuple(stages) or -1, **peer.options).eval()
        for module in linglo.modules() if name.endswith('_branches') else ():
            if isinstance(module, (FFN, ConditionalPositionalEncoding)):
                module.fast = False
        if fused:
            linglo.switch_to_deploy()
        return Plain(linglo, maps, name.endswith('_materialised'))
    if 'type' in peer.options:
        config = dict(peer.options, out_indices=tuple(stages or STAGES))
        return Plain(MODELS.build(config), maps).eval()
    import timm

    outputs: Dict[str, Any] = dict(num_classes=0)
    if maps:
        indices = tuple(stage + peer.first_map for stage in stages)
        outputs = dict(features_only=True, out_indices=indices, **peer.options)
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
    """One of the paper's three comparisons."""

    title: str  # what the models are, and where the paper's numbers come from
    config: str  # this package's, in which backbones are exchanged
    shape: Tuple[int, int]  # height and width in pixels of the image that is counted
    columns: Tuple[str, ...]  # of the paper; the second one is drawn
    accuracy: str  # what the second one is called in the figure


TASKS = {
    'classification': Task(
        title='ImageNet-1K Classification (Paper Table 2)',
        config='imagenet/linglo-b0_8xb128_in1k.py',
        shape=(224, 224),
        columns=('paper_params_m', 'paper_top1'),
        accuracy='Top-1 Accuracy (%)',
    ),
    'detection': Task(
        title='COCO, RetinaNet 1x (Paper Table 3)',
        config='coco/retinanet_linglo-b0_fpn_1x_coco.py',
        shape=(800, 1344),  # 800 x 1333 as the data preprocessor pads it
        columns=('paper_params_m', *(f'paper_ap{of}' for of in ('', '50', '75', '_s', '_m', '_l'))),
        accuracy='Box AP',
    ),
    'segmentation': Task(
        title='ADE20K, SemanticFPN 40k (Paper Table 4)',
        config='ade20k/fpn_linglo-b0_8xb4-40k_ade20k-512x512.py',
        shape=(512, 512),
        columns=('paper_params_m', 'paper_miou'),
        accuracy='mIoU (%)',
    ),
}
PAPER: Dict[str, Tuple[Tuple[float, ...], ...]] = {
    'DeiT-Tiny/16': ((5.7, 72.2), (), ()),
    'LinGlo-b0': ((3.4, 72.5), (13.0, 38.0, 58.3, 40.2, 22.8, 41.2, 49.6), (7.6, 37.3)),
    'ResNet18': ((11.7, 69.8), (21.3, 31.8, 49.6, 33.6, 16.3, 34.3, 43.2), (15.5, 32.9)),
    'LambdaNet-50': ((15.0, 78.4), (), ()),
    'PVT-Tiny': ((13.2, 75.1), (23.0, 36.7, 56.9, 38.9, 22.6, 38.8, 50.0), (17.0, 35.7)),
    'LinGlo-b1': ((13.1, 79.7), (23.8, 41.5, 62.4, 44.5, 27.1, 45.4, 53.9), (17.8, 42.5)),
    'ResNet50': ((25.6, 79.8), (37.7, 36.3, 55.3, 38.6, 19.3, 40.0, 48.8), (28.5, 36.7)),
    'DeiT-Small/16': ((22.1, 79.9), (), ()),
    'TNT-S': ((23.8, 81.3), (), ()),
    'PVT-Small': ((), (34.2, 40.4, 61.3, 43.0, 25.0, 42.9, 55.7), (28.2, 39.8)),
    'Twins-PCPVT-S': ((), (34.4, 43.0, 64.1, 46.0, 27.5, 46.3, 57.3), (28.4, 44.3)),
    'Twins-SVT-S': ((24.0, 81.3), (34.3, 42.3, 63.4, 45.2, 26.0, 45.5, 56.5), (28.3, 42.6)),
    'Swin-T': ((29.0, 81.3), (38.5, 41.5, 62.1, 44.2, 25.1, 44.9, 55.5), (31.9, 41.5)),
    'Focal-Tiny': ((29.1, 82.2), (), ()),
    'CoAtNet-0': ((25.0, 81.6), (), ()),
    'ConvNeXt-T': ((29.0, 82.1), (), ()),
    'LinGlo-b2': ((25.4, 82.7), (35.1, 44.7, 65.8, 47.9, 28.0, 48.9, 57.8), (29.1, 45.2)),
}
"""The paper's numbers by backbone: the columns of each of :data:`TASKS`, none where it is not in the table."""


def get_paper_numbers(task: str, label: str) -> Dict[str, float]:
    """Get a backbone's line in the paper's table of a task; empty if it is not there."""
    numbers = dict(zip(TASKS, PAPER.get(label, ()))).get(task, ())
    return dict(zip(TASKS[task].columns, numbers))


def list_labels(task: str) -> List[str]:
    """List the backbones of a task: the paper's table first, in its order, then the others that can be built."""
    in_paper = [label for label in PAPER if get_paper_numbers(task, label)]
    others = [peer.label for peer in PEERS.values() if peer.has_maps or task == 'classification']
    return list(dict.fromkeys([*in_paper, *others]))


def build_with_backbone(cfg: Config, label: str, shape: Tuple[int, int]) -> Optional[nn.Module]:
    """Build the model of a task's config with another backbone; None if no package provides that one.

    It has random weights, and is in evaluation mode. A classifier of timm comes whole.

    Args:
        cfg: Config with LinGlo of one of :data:`TASKS`.
        label: Backbone's name, from :func:`list_labels`.
        shape: Height and width of the images in pixels.
    """
    name = next((name for name, peer in PEERS.items() if peer.label == label), None)
    if name is None:
        return None
    cfg, peer = copy.deepcopy(cfg), PEERS[name]
    from_timm = not name.startswith('linglo') and 'type' not in peer.options
    if cfg.default_scope == 'mmpretrain' and from_timm:
        size = dict(img_size=shape) if peer.image_size else {}
        cfg.model = dict(type='TimmClassifier', model_name=name, pretrained=False, **size)
        return build_model(cfg).eval()
    stages = cfg.model.backbone.out_indices
    with torch.no_grad():
        maps = build_backbone(name, (64, 64), stages)(torch.zeros(1, 3, 64, 64))
    channels = [x.shape[1] for x in maps]
    if cfg.default_scope == 'mmpretrain':
        cfg.model.head.in_channels = channels[0]
        cfg.model.train_cfg = None  # the augmentations of batches
    else:
        cfg.model.neck.in_channels = channels
    model = build_model(cfg).eval()
    model.backbone = build_backbone(name, shape, stages)
    model.backbone.register_forward_hook(lambda _module, _inputs, maps: tuple(maps))
    return model


def compare_backbone(task: str, cfg: Config, label: str) -> Dict[str, Any]:
    """Count a backbone for a task: a row with the units in the names.

    What was counted for one image is there if a package provides the backbone, and the paper's numbers
    (``paper_...``) if it is in the paper's table.
    """
    row: Dict[str, Any] = dict(task=task, backbone=label)
    model = build_with_backbone(cfg, label, TASKS[task].shape)
    if model is not None:
        for form, found in count_forms(model, TASKS[task].shape).items():
            prefix = '' if form == 'training' else 'deployed_'
            row[f'{prefix}params_m'] = found.params / 1e6
            row[f'{prefix}macs_g'] = found.macs / 1e9
    return {**row, **get_paper_numbers(task, label)}

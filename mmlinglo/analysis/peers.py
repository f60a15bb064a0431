# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The paper's tables 2-4: their numbers, and their backbones as the toolboxes provide them."""

import copy
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

from mmengine.config import Config
from torch import nn

from mmlinglo.analysis.complexity import count_forms
from mmlinglo.utils.deploy import build_model


class Task(NamedTuple):
    """One of the paper's three comparisons.

    Attributes:
        title: What the models are, and where the paper's numbers come from.
        config: This package's config, in which backbones are exchanged.
        shape: Height and width in pixels of the image for which operations are counted.
        columns: Keys of the paper's columns and their headings.
        accuracy: Key of the column that is drawn.
        paper: The paper's numbers by backbone, in the order of its table and columns.
    """

    title: str
    config: str
    shape: Tuple[int, int]
    columns: Dict[str, str]
    accuracy: str
    paper: Dict[str, Tuple[float, ...]]


TASKS = {
    'classification': Task(
        title='ImageNet-1K classification (paper Table 2)',
        config='imagenet/linglo-b0_8xb128_in1k.py',
        shape=(224, 224),
        columns=dict(paper_params_m='Param(M)', paper_top1='Top-1 Acc(%)'),
        accuracy='paper_top1',
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
        title='COCO, RetinaNet 1x (paper Table 3)',
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
        accuracy='paper_ap',
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
        title='ADE20K, SemanticFPN 40k (paper Table 4)',
        config='ade20k/fpn_linglo-b0_8xb4-40k_ade20k-512x512.py',
        shape=(512, 512),
        columns=dict(paper_params_m='Param(M)', paper_miou='mIoU(%)'),
        accuracy='paper_miou',
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


class Pyramid(NamedTuple):
    """A backbone that gives a feature map for each of four stages.

    Attributes:
        config: Its config without ``out_indices``.
        channels: Channels of the four maps.
        indices: What ``out_indices`` calls the four stages.
    """

    config: dict
    channels: Tuple[int, int, int, int]
    indices: Tuple[int, int, int, int] = (0, 1, 2, 3)


PYRAMIDS = {
    'LinGlo-b0': Pyramid(dict(type='mmlinglo.LinGlo', arch='b0'), (32, 64, 160, 256)),
    'LinGlo-b1': Pyramid(dict(type='mmlinglo.LinGlo', arch='b1'), (64, 128, 320, 512)),
    'LinGlo-b2': Pyramid(dict(type='mmlinglo.LinGlo', arch='b2'), (64, 128, 320, 512)),
    'ResNet18': Pyramid(dict(type='mmpretrain.ResNet', depth=18), (64, 128, 256, 512)),
    'ResNet50': Pyramid(dict(type='mmpretrain.ResNet', depth=50), (256, 512, 1024, 2048)),
    'PVT-Tiny': Pyramid(
        dict(type='mmdet.PyramidVisionTransformer', num_layers=[2, 2, 2, 2]), (64, 128, 320, 512)
    ),
    'PVT-Small': Pyramid(
        dict(type='mmdet.PyramidVisionTransformer', num_layers=[3, 4, 6, 3]), (64, 128, 320, 512)
    ),
    'Twins-PCPVT-S': Pyramid(
        dict(
            type='mmpretrain.PCPVT',
            arch='small',
            qkv_bias=True,
            norm_after_stage=[False, False, False, True],
        ),
        (64, 128, 320, 512),
    ),
    'Twins-SVT-S': Pyramid(
        dict(
            type='mmpretrain.SVT',
            arch='small',
            qkv_bias=True,
            norm_after_stage=[False, False, False, True],
        ),
        (64, 128, 256, 512),
    ),
    'Swin-T': Pyramid(dict(type='mmpretrain.SwinTransformer', arch='tiny'), (96, 192, 384, 768)),
    'ConvNeXt-T': Pyramid(
        dict(type='mmpretrain.ConvNeXt', arch='tiny', gap_before_final_norm=False),
        (96, 192, 384, 768),
    ),
    'PVTv2-B0': Pyramid(
        dict(type='mmdet.PyramidVisionTransformerV2', embed_dims=32, num_layers=[2, 2, 2, 2]),
        (32, 64, 160, 256),
    ),
    'PVTv2-B1': Pyramid(
        dict(type='mmdet.PyramidVisionTransformerV2', embed_dims=64, num_layers=[2, 2, 2, 2]),
        (64, 128, 320, 512),
    ),
    'PVTv2-B2': Pyramid(
        dict(type='mmdet.PyramidVisionTransformerV2', embed_dims=64, num_layers=[3, 4, 6, 3]),
        (64, 128, 320, 512),
    ),
    'PoolFormer-S12': Pyramid(
        dict(type='mmpretrain.PoolFormer', arch='s12'), (64, 128, 320, 512), indices=(0, 2, 4, 6)
    ),
}


def _token_classifier(backbone: dict, head: str, channels: int) -> dict:
    head_cfg = dict(type=head, num_classes=1000, in_channels=channels)
    return dict(type='ImageClassifier', backbone=backbone, head=head_cfg)


CLASSIFIERS = {  # those that give no feature maps of four sizes
    'DeiT-Tiny/16': _token_classifier(
        dict(type='VisionTransformer', arch='deit-tiny', img_size=224, patch_size=16),
        'VisionTransformerClsHead',
        192,
    ),
    'DeiT-Small/16': _token_classifier(
        dict(type='VisionTransformer', arch='deit-small', img_size=224, patch_size=16),
        'VisionTransformerClsHead',
        384,
    ),
    'TNT-S': _token_classifier(dict(type='TNT', arch='s', qkv_bias=False), 'LinearClsHead', 384),
    'CoAtNet-0': dict(type='TimmClassifier', model_name='coatnet_0_224'),
}


def backbone_names(task: str) -> List[str]:
    """Backbones of a task: the paper's table first, in its order, then the others that can be built."""
    built = {**PYRAMIDS, **CLASSIFIERS} if task == 'classification' else PYRAMIDS
    return list(dict.fromkeys([*TASKS[task].paper, *built]))


def build_with_backbone(cfg: Config, name: str) -> Optional[nn.Module]:
    """Build the model of a config with another backbone, with random weights, in evaluation mode.

    Args:
        cfg: Config with LinGlo of one of :data:`TASKS`. Neck or head take
            the backbone's channels; all else stays.
        name: Backbone's name, from :func:`backbone_names`.

    Returns:
        The model; None if no toolbox provides that backbone.
    """
    cfg = copy.deepcopy(cfg)
    if name in CLASSIFIERS:
        cfg.model = CLASSIFIERS[name]
    elif name in PYRAMIDS:
        pyramid = PYRAMIDS[name]
        stages = cfg.model.backbone.out_indices
        cfg.model.backbone = dict(
            **pyramid.config, out_indices=[pyramid.indices[i] for i in stages]
        )
        channels = [pyramid.channels[i] for i in stages]
        if cfg.default_scope == 'mmpretrain':
            cfg.model.head.in_channels = channels[0]
            cfg.model.train_cfg = None  # the augmentations of batches
        else:
            cfg.model.neck.in_channels = channels
    else:
        return None
    model = build_model(cfg).eval()
    if name in PYRAMIDS:
        # mmdet's PVTs return a list, which mmpretrain's necks refuse.
        model.backbone.register_forward_hook(lambda _module, _inputs, maps: tuple(maps))
    return model


def comparison_row(task: str, cfg: Config, name: str) -> dict:
    """A backbone's line in the comparison of a task.

    Args:
        task: Key of :data:`TASKS`.
        cfg: The task's config.
        name: Backbone's name, from :func:`backbone_names`.

    Returns:
        What was counted for one image (``params_m``, ``deployed_params_m`` in 10^6;
        ``macs_g``, ``deployed_macs_g``, ``elementwise_g``, ``deployed_elementwise_g`` in
        10^9) if a toolbox provides the backbone, and the paper's numbers (``paper_...``)
        if it is in the paper's table.
    """
    row = dict(task=task, backbone=name)
    model = build_with_backbone(cfg, name)
    if model is not None:
        for form, complexity in count_forms(model, TASKS[task].shape).items():
            prefix = '' if form == 'training' else 'deployed_'
            row[f'{prefix}params_m'] = complexity.params / 1e6
            row[f'{prefix}macs_g'] = complexity.macs / 1e9
            row[f'{prefix}elementwise_g'] = complexity.elementwise / 1e9
    row.update(zip(TASKS[task].columns, TASKS[task].paper.get(name, ())))
    return row


def plot_comparison(rows: List[dict], out: Path) -> None:
    """Draw the paper's accuracy against the multiply-adds counted, a panel for each task.

    Backbones that lack either are left out.

    Args:
        rows: From :func:`comparison_row`.
        out: PNG file to write; its folder must exist.
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row['task'] for row in rows))
    figure = Figure(figsize=(1 + 5.5 * len(tasks), 6), layout='constrained')
    for axes, name in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks):
        task = TASKS[name]
        points = [
            (row['backbone'], row['deployed_macs_g'], row[task.accuracy])
            for row in rows
            if row['task'] == name and 'macs_g' in row and task.accuracy in row
        ]
        ours = sorted((x, y) for label, x, y in points if label.startswith('LinGlo'))
        others = [(x, y) for _, x, y in points if (x, y) not in ours]
        if ours:
            axes.plot(*zip(*ours), 'o-', color='tab:red', label='LinGlo, deployed')
        if others:
            axes.plot(*zip(*others), 's', color='tab:gray', label='others')
        xs = [x for _, x, _ in points]
        reach = 0.35 * (max(xs, default=0) - min(xs, default=0))
        for label, x, y in points:
            crowded = any(x < x2 < x + reach and abs(y - y2) < 0.2 for _, x2, y2 in points)
            offset, side = ((-6, 3), 'right') if crowded or (x, y) in ours else ((6, -3), 'left')
            axes.annotate(
                label,
                (x, y),
                offset,
                textcoords='offset points',
                ha=side,
                fontsize='small',
                bbox=dict(facecolor='white', edgecolor='none', alpha=0.8, pad=0.5),
            )
        axes.margins(x=0.32)
        axes.set_title(task.title)
        height, width = task.shape
        axes.set_xlabel(f'multiply-adds counted, {height} x {width} pixels ($10^9$)')
        axes.set_ylabel(f'{task.columns[task.accuracy]} that the paper reports')
        axes.grid(alpha=0.3)
        if points:
            axes.legend(loc='lower right')
        else:
            axes.text(0.5, 0.5, 'no data', transform=axes.transAxes, ha='center')
    figure.savefig(out, dpi=150)

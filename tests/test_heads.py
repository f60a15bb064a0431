# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Necks and heads compute the same on LinGlo's maps as on contiguous copies, in every kind of recipe."""

import math

import pytest
import torch
from conftest import TINY_ARCH, randomize_norms_
from test_configs import inputs_for, leaf, make_small
from torch import Tensor
from torchvision.ops import roi_align

from mmlinglo.utils.deploy import build_model, switch_to_deploy

RECIPES = [
    'cascade-mask-rcnn_linglo-b1_fpn_4conv1fc-giou_ms-crop-3x_coco',
    'dino-4scale_linglo-b1_8xb2-12e_coco',
    'faster-rcnn_linglo-b1_fpn_1x_coco',
    'fpn_linglo-b1_8xb4-40k_ade20k-512x512',
    'linglo-b1_8xb128_in1k',
    'mask-rcnn_linglo-b1_fpn_1x_coco',
    'mask2former_linglo-b1_8xb2-lsj-50e_coco',
    'retinanet_linglo-b1_fpn_1x_coco',
    'rtmdet_linglo-b1_8xb32-300e_coco',
    'segformer_linglo-b1_8xb2-160k_ade20k-512x512',
    'upernet_linglo-b1_8xb2-160k_ade20k-512x512',
]


def small_model(name, use_torchvision=True):
    cfg = leaf(name)
    make_small(cfg)
    backbone = cfg.model.backbone
    backbone.update(arch=TINY_ARCH, drop_path_rate=0.0, init_cfg=None)
    channels = [TINY_ARCH['embed_dims'][i] for i in backbone.get('out_indices', range(4))]
    first = next(k for k in ('neck', 'decode_head', 'panoptic_head', 'head') if cfg.model.get(k))
    if cfg.default_scope == 'mmpretrain':
        first, channels = 'head', channels[-1]
    cfg.model[first].in_channels = channels
    if 'auxiliary_head' in cfg.model:
        cfg.model.auxiliary_head.in_channels = channels[cfg.model.auxiliary_head.in_index]
    for part in ('bbox_roi_extractor', 'mask_roi_extractor'):
        for extractor in [cfg.model.get('roi_head', {}).get(part)]:
            if extractor is not None:
                extractor.roi_layer.use_torchvision = use_torchvision
    model = build_model(cfg)
    model.init_weights()  # DINO's level embedding is uninitialized memory until then
    return cfg, randomize_norms_(model)


def copy_maps(_module, _args, maps):
    """A hook: fresh contiguous maps, whatever the layout was."""
    copies = tuple(torch.empty(x.shape).copy_(x) for x in maps)
    assert all(x.stride() == torch.empty(x.shape).stride() for x in copies)
    return copies


def numbers_in(value):
    """All tensors in a nested result, in order."""
    if isinstance(value, Tensor):
        return [value]
    if hasattr(value, 'all_items'):  # a data sample
        value = dict(value.all_items())
    if isinstance(value, dict):
        return [x for key in sorted(value) for x in numbers_in(value[key])]
    if isinstance(value, (list, tuple)):
        return [x for each in value for x in numbers_in(each)]
    return []


@pytest.mark.parametrize('form', ['training', 'evaluation', 'deployed'])
@pytest.mark.parametrize('name', RECIPES)
def test_same_on_contiguous_copies(name, form):
    cfg, model = small_model(name, use_torchvision=form != 'evaluation')
    model.train(form == 'training')
    if form == 'deployed':
        switch_to_deploy(model)
    data = model.data_preprocessor(inputs_for(cfg, model, 96), training=form == 'training')
    mode = 'loss' if form == 'training' else 'predict'
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def run():
        model.load_state_dict(state)  # running statistics
        torch.manual_seed(1)
        with torch.set_grad_enabled(form == 'training'):
            return numbers_in(model(**data, mode=mode))

    ours = run()
    model.backbone.register_forward_hook(copy_maps)
    expected = run()
    assert len(ours) == len(expected) > 0
    for value, reference in zip(ours, expected):
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('use_torchvision', [True, False])
@pytest.mark.parametrize('size', [(64, 96), (47, 33)])
def test_region_features(size, use_torchvision):
    """Of a Faster R-CNN, against bilinear samples of the map of the level that each box's size asks for (FPN, Eq. 1)."""
    _, model = small_model('faster-rcnn_linglo-b1_fpn_1x_coco', use_torchvision)
    model.eval()
    height, width = size
    boxes = torch.tensor(
        [
            [0, 1.0, 2.0, 30.5, 20.25],
            [1, 0.0, 0.0, width, height],
            [0, 5.0, 7.0, 12.0, 13.0],
            [1, -400.0, -300.0, 400.0, 350.0],
        ]
    )
    with torch.no_grad():
        maps = model.extract_feat(torch.randn(2, 3, *size))
        found = model.roi_head.bbox_roi_extractor(maps[:4], boxes)
    for box, features in zip(boxes, found):
        _, left, top, right, bottom = box.tolist()
        level = math.floor(math.log2(math.sqrt((right - left) * (bottom - top)) / 56 + 1e-6))
        level = min(3, max(0, level))
        reference = roi_align(
            maps[level].double().contiguous(),
            box[None].double(),
            output_size=7,
            spatial_scale=1 / (4, 8, 16, 32)[level],
            aligned=True,
        )
        torch.testing.assert_close(features, reference[0].float(), rtol=1e-4, atol=1e-5)

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Training steps of whole models with CUDA tensors without data: what is on the wrong device is found.

Losses of detectors assign boxes by their values, so detectors go as far as their heads.
"""

from types import MethodType

import pytest
import torch
from conftest import ROOT, needs_counting
from mmengine.config import Config
from mmengine.structures import PixelData
from torch import nn

from mmlinglo.analysis.complexity import _forward_with_most_regions
from mmlinglo.analysis.launches import AMP, count_launches
from mmlinglo.utils.deploy import build_model

pytestmark = needs_counting
IMAGES = (2, 3, 128, 128)


def segmentation_samples(x):
    from mmseg.structures import SegDataSample

    labels = torch.zeros(1, *x.shape[2:], dtype=torch.int64, device=x.device)
    samples = [SegDataSample(gt_sem_seg=PixelData(data=labels)) for _ in x]
    for sample in samples:
        sample.set_metainfo(dict(img_shape=x.shape[2:], ori_shape=x.shape[2:]))
    return samples


def classification_samples(x):
    from mmpretrain.structures import DataSample

    # Mixed labels, as the data preprocessor's batch augmentations make them.
    scores = torch.full((1000,), 1e-3, device=x.device)
    return [DataSample().set_gt_score(scores) for _ in x]


class TrainingStep(nn.Module):
    """From images to losses, or for detectors to what their heads predict."""

    def __init__(self, model, make_samples):
        super().__init__()
        self.model, self.make_samples = model, make_samples

    def forward(self, x):
        if self.make_samples is None:
            return self.model(x, mode='tensor')
        losses = self.model(x, self.make_samples(x), mode='loss')
        return [loss for name, loss in losses.items() if 'loss' in name]


def build_training_step(config):
    cfg = Config.fromfile(ROOT / 'configs' / config)
    model = build_model(cfg).train()
    if hasattr(model, 'roi_head'):
        model.forward = MethodType(_forward_with_most_regions, model)
    samples = dict(mmseg=segmentation_samples, mmpretrain=classification_samples)
    return TrainingStep(model, samples.get(cfg.default_scope))


@pytest.mark.slow
@pytest.mark.parametrize(
    'config',
    [
        'imagenet/linglo-b0_8xb128_in1k.py',
        'ade20k/fpn_linglo-b0_8xb4-40k_ade20k-512x512.py',
        'ade20k/segformer_linglo-b0_8xb2-160k_ade20k-512x512.py',
        'ade20k/upernet_linglo-b1_8xb2-160k_ade20k-512x512.py',
        'coco/retinanet_linglo-b0_fpn_1x_coco.py',
        'coco/faster-rcnn_linglo-b0_fpn_1x_coco.py',
        'coco/mask-rcnn_linglo-b0_fpn_1x_coco.py',
        'coco/cascade-mask-rcnn_linglo-b1_fpn_4conv1fc-giou_ms-crop-3x_coco.py',
    ],
)
def test_training_step(config):
    step = build_training_step(config)
    for amp in AMP:
        whole = count_launches(step, IMAGES, amp)
        assert whole.forward.launches > 400
        assert whole.backward.launches > 500
    backbone = count_launches(step.model.backbone, IMAGES, amp)
    both = backbone.forward + backbone.backward
    assert both.host_copies == both.syncs == 0


def test_a_head_left_on_the_cpu_is_found():
    step = build_training_step('coco/retinanet_linglo-b0_fpn_1x_coco.py')
    shift = torch.ones(1, 256, 1, 1)  # neither parameter nor buffer
    head = step.model.bbox_head
    head.forward_single = MethodType(
        lambda self, x: type(self).forward_single(self, x + shift), head
    )
    with pytest.raises(RuntimeError, match='cpu'):
        count_launches(step, IMAGES)

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""A two-stage detector learns: with region features of the wrong places it does not."""

import pytest
from conftest import ROOT, run_tool
from mmengine.config import Config
from trainings import QUICKSTART, TASKS, logged

CHANNELS, NUM_CLASSES = 64, 4


@pytest.mark.slow
def test_faster_rcnn_learns_the_shapes(tmp_path):
    """300 steps. mAP was 0.03 here while RoIAlign read LinGlo's maps in another order."""
    run_tool('tools/misc/make_shapes.py', tmp_path / 'shapes')
    cfg = Config.fromfile(QUICKSTART / TASKS['detection'])
    model = Config.fromfile(ROOT / 'configs/_base_/models/faster-rcnn_linglo_fpn.py').model
    model.backbone.drop_path_rate = 0.0
    model.neck.out_channels = CHANNELS
    model.rpn_head.update(in_channels=CHANNELS, feat_channels=CHANNELS)
    model.rpn_head.anchor_generator.scales = [4]
    model.roi_head.bbox_roi_extractor.out_channels = CHANNELS
    model.roi_head.bbox_head.update(
        in_channels=CHANNELS, fc_out_channels=128, num_classes=NUM_CLASSES
    )
    model.train_cfg.rpn_proposal.update(nms_pre=200, max_per_img=100)
    model.train_cfg.rcnn.sampler.num = 64
    model.test_cfg.rpn.update(nms_pre=200, max_per_img=100)
    cfg.model = model
    root = f'{tmp_path}/shapes/coco/'
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.data_root = root
    for split in ('val', 'test'):
        cfg[f'{split}_evaluator'].ann_file = f'{root}annotations/val.json'
    cfg.randomness = dict(seed=0)
    cfg.train_cfg.update(max_epochs=1, val_interval=1)
    cfg.dump(tmp_path / 'config.py')
    run_tool('tools/train.py', tmp_path / 'config.py', '--work-dir', tmp_path / 'work')
    scores = [
        line['coco/bbox_mAP'] for line in logged(tmp_path / 'work') if 'coco/bbox_mAP' in line
    ]
    assert scores[-1] > 0.3  # 0.51 and 0.59 in two runs, 0.03 with scrambled features

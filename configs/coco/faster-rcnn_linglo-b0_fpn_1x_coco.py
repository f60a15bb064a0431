"""Faster R-CNN with LinGlo-b0 on COCO, 1x. Not yet trained by this project.

Not of the paper: mmdet's `faster-rcnn_r50_fpn_1x_coco` with the optimizer of PVT's published Mask R-CNN recipes.

bash tools/dist_train.sh configs/coco/faster-rcnn_linglo-b0_fpn_1x_coco.py 8
"""

_base_ = [
    '../_base_/models/faster-rcnn_linglo_fpn.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/schedule_1x_adamw_two-stage.py',
    '../_base_/default_runtime_det.py',
]

# where the ImageNet recipe leaves its weights; None trains from scratch
pretrained = 'work_dirs/linglo-b0_8xb128_in1k/epoch_300.pth'
model = dict(
    backbone=dict(
        arch='b0',
        init_cfg=dict(type='Pretrained', checkpoint=pretrained, prefix='backbone.'),
    ),
    neck=dict(in_channels=[32, 64, 160, 256]),
)

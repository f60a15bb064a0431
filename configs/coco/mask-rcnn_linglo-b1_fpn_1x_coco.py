"""Mask R-CNN with LinGlo-b1 on COCO, 1x. Not yet trained by this project.

Not of the paper: PVT v2's published `mask_rcnn_pvt_v2_b1_fpn_1x_coco`.

bash tools/dist_train.sh configs/coco/mask-rcnn_linglo-b1_fpn_1x_coco.py 8
"""

_base_ = [
    '../_base_/models/mask-rcnn_linglo_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/schedule_1x_adamw_two-stage.py',
    '../_base_/default_runtime_det.py',
]

# where the ImageNet recipe leaves its weights; None trains from scratch
pretrained = 'work_dirs/linglo-b1_8xb128_in1k/epoch_300.pth'
model = dict(
    backbone=dict(
        arch='b1',
        init_cfg=dict(type='Pretrained', checkpoint=pretrained, prefix='backbone.'),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)

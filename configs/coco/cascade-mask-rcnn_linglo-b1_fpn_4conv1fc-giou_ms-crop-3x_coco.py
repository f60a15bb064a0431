"""Cascade Mask R-CNN with LinGlo-b1 on COCO, multi-scale, 3x. Not yet trained by this project.

Not of the paper: PVT v2's published `cascade_mask_rcnn_pvt_v2_b2_fpn_3x_mstrain_fp16`, here in float32.

bash tools/dist_train.sh configs/coco/cascade-mask-rcnn_linglo-b1_fpn_4conv1fc-giou_ms-crop-3x_coco.py 8
"""

_base_ = [
    '../_base_/models/cascade-mask-rcnn_linglo_fpn_4conv1fc-giou.py',
    '../_base_/datasets/coco_instance_ms-crop.py',
    '../_base_/schedules/schedule_3x_adamw.py',
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

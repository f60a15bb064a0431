"""RetinaNet with LinGlo-b2 on COCO, 1x (paper Sec. 4.2, Table 3: box AP 44.7). Not yet trained by this project.

bash tools/dist_train.sh configs/coco/retinanet_linglo-b2_fpn_1x_coco.py 8
"""

_base_ = [
    '../_base_/models/retinanet_linglo_fpn.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/schedule_1x_adamw.py',
    '../_base_/default_runtime_det.py',
]

# where the ImageNet recipe leaves its weights; None trains from scratch
pretrained = 'work_dirs/linglo-b2_8xb128_in1k/epoch_300.pth'
model = dict(
    backbone=dict(
        arch='b2',
        init_cfg=dict(type='Pretrained', checkpoint=pretrained, prefix='backbone.'),
    ),
    neck=dict(in_channels=[128, 320, 512]),
)

"""SemanticFPN with LinGlo-b1 on ADE20K, 40k (paper Sec. 4.3, Table 4: mIoU 42.5). Not yet trained by this project.

bash tools/dist_train.sh configs/ade20k/fpn_linglo-b1_8xb4-40k_ade20k-512x512.py 8
"""

_base_ = [
    '../_base_/models/fpn_linglo.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/schedule_40k_adamw.py',
    '../_base_/default_runtime_seg.py',
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

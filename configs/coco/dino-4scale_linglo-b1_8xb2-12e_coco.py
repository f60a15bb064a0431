"""DINO with LinGlo-b1 on COCO, four scales, 12 epochs. Not yet trained by this project.

Not of the paper: mmdet's `dino-4scale_r50_8xb2-12e_coco`.

bash tools/dist_train.sh configs/coco/dino-4scale_linglo-b1_8xb2-12e_coco.py 8
"""

_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'

# where the ImageNet recipe leaves its weights; None trains from scratch
pretrained = 'work_dirs/linglo-b1_8xb128_in1k/epoch_300.pth'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmlinglo.LinGlo',
        arch='b1',
        out_indices=(1, 2, 3),
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained, prefix='backbone.'),
    ),
    neck=dict(in_channels=[128, 320, 512]),
)

sync_bn = 'torch'
default_hooks = dict(
    checkpoint=dict(
        type='mmlinglo.SafeCheckpointHook',
        max_keep_ckpts=3,
        save_best='coco/bbox_mAP',
        rule='greater',
    ),
    reseed=dict(type='mmlinglo.ReseedHook'),
    picture_errors=dict(type='mmlinglo.PictureErrorsHook'),
    non_finite=dict(type='mmlinglo.NonFiniteLossHook', action='stop'),
)
auto_scale_lr = dict(enable=False)

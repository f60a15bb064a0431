"""Mask2Former with LinGlo-b1 on COCO instances, large-scale jitter, 50 epochs. Not yet trained by this project.

Not of the paper: mmdet's `mask2former_r50_8xb2-lsj-50e_coco`.

bash tools/dist_train.sh configs/coco/mask2former_linglo-b1_8xb2-lsj-50e_coco.py 8
"""

_base_ = 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'

# where the ImageNet recipe leaves its weights; None trains from scratch
pretrained = 'work_dirs/linglo-b1_8xb128_in1k/epoch_300.pth'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmlinglo.LinGlo',
        arch='b1',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained, prefix='backbone.'),
    ),
    panoptic_head=dict(in_channels=[64, 128, 320, 512]),
)

sync_bn = 'torch'
default_hooks = dict(
    checkpoint=dict(type='mmlinglo.SafeCheckpointHook', save_best='coco/segm_mAP', rule='greater'),
    reseed=dict(type='mmlinglo.ReseedHook'),
    picture_errors=dict(type='mmlinglo.PictureErrorsHook'),
    non_finite=dict(type='mmlinglo.NonFiniteLossHook', action='stop'),
)
auto_scale_lr = dict(enable=False)

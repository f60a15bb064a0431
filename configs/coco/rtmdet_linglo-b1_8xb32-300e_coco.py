"""RTMDet with LinGlo-b1 on COCO, 300 epochs. Not yet trained by this project.

Not of the paper: mmdet's `rtmdet_m_8xb32-300e_coco`, with the channel order and normalization of the backbone's
ImageNet training.

bash tools/dist_train.sh configs/coco/rtmdet_linglo-b1_8xb32-300e_coco.py 8
"""

_base_ = 'mmdet::rtmdet/rtmdet_m_8xb32-300e_coco.py'

# where the ImageNet recipe leaves its weights; None trains from scratch
pretrained = 'work_dirs/linglo-b1_8xb128_in1k/epoch_300.pth'
model = dict(
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True
    ),
    backbone=dict(
        _delete_=True,
        type='mmlinglo.LinGlo',
        arch='b1',
        out_indices=(1, 2, 3),
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained, prefix='backbone.'),
    ),
    # sync_bn makes SyncBN of these, too
    neck=dict(in_channels=[128, 320, 512], norm_cfg=dict(type='BN')),
    bbox_head=dict(norm_cfg=dict(type='BN')),
)

sync_bn = 'torch'
default_hooks = dict(
    checkpoint=dict(type='mmlinglo.SafeCheckpointHook', save_best='coco/bbox_mAP', rule='greater'),
    reseed=dict(type='mmlinglo.ReseedHook'),
    picture_errors=dict(type='mmlinglo.PictureErrorsHook'),
    non_finite=dict(type='mmlinglo.NonFiniteLossHook', action='stop'),
)
auto_scale_lr = dict(enable=False, base_batch_size=256)

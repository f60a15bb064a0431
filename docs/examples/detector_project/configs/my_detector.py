# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""mmdet's RetinaNet with our backbone, on our data."""

_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['my_project'])

data_root = 'data/shapes/coco/'
metainfo = dict(
    classes=('disc', 'square', 'triangle', 'star'),
    palette=[(230, 70, 70), (70, 160, 230), (90, 200, 90), (240, 200, 60)],
)
scale = (96, 96)  # largest width and height; resizing keeps the aspect ratio

model = dict(
    # _delete_ drops the settings of the ResNet, including its weights
    backbone=dict(_delete_=True, type='GatedLinGlo', arch='b0', out_indices=(1, 2, 3)),
    # the channels of stages 1, 2 and 3, all of which the neck uses
    neck=dict(in_channels=[64, 160, 256], start_level=0),
    bbox_head=dict(num_classes=4),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/train.json',
        data_prefix=dict(img='train/'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    num_workers=1,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/val.json',
        data_prefix=dict(img='val/'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/val.json')
test_evaluator = val_evaluator

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=10, norm_type=2),
)
sync_bn = 'torch'  # batch-norm statistics of all GPUs together

"""A small RetinaNet with LinGlo-b0 that learns in minutes on two CPU cores, from scratch, on synthetic shapes.

bash tools/quickstart.sh detection

For your own data in COCO format, inherit from it, as retinanet_linglo-b0_fpn_2xb4-20e_bccd-320x240.py does.
"""

_base_ = [
    '../_base_/models/retinanet_linglo_fpn.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/schedule_1x_adamw.py',
    '../_base_/default_runtime_det.py',
]

data_root = 'data/shapes/coco/'
metainfo = dict(
    classes=('disc', 'square', 'triangle', 'star'),
    palette=[(230, 70, 70), (70, 160, 230), (90, 200, 90), (240, 200, 60)],
)

# A quarter of the usual head: with images this small it would cost more than the backbone.
model = dict(
    backbone=dict(drop_path_rate=0.0),  # too few steps for regularization
    neck=dict(out_channels=64),
    bbox_head=dict(
        num_classes=4,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        # mmdet's own initialization: a small first box loss, which counts in so few steps
        init_cfg=dict(
            _delete_=True,
            type='Normal',
            layer='Conv2d',
            std=0.01,
            override=dict(type='Normal', name='retina_cls', std=0.01, bias_prob=0.01),
        ),
    ),
)

resize = dict(type='Resize', scale=(160, 160), keep_ratio=True)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    resize,
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    resize,
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataloader = dict(
    batch_size=4,  # many small steps learn faster than few large ones here
    num_workers=1,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/train.json',
        data_prefix=dict(img='train/'),
        filter_cfg=dict(min_size=8),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
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
    optimizer=dict(lr=1e-3, weight_decay=0.05), clip_grad=dict(max_norm=10, norm_type=2)
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20),
    # without `end`, until the last epoch
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=3, val_interval=3)
default_hooks = dict(logger=dict(interval=25))
auto_scale_lr = dict(base_batch_size=8)

"""A small SemanticFPN with LinGlo-b0 that learns in minutes on two CPU cores, from scratch, on synthetic shapes.

bash tools/quickstart.sh segmentation
"""

_base_ = [
    '../_base_/models/fpn_linglo.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/schedule_40k_adamw.py',
    '../_base_/default_runtime_seg.py',
]

data_root = 'data/shapes/ade/'
metainfo = dict(
    classes=('background', 'disc', 'square', 'triangle', 'star'),
    palette=[[60, 60, 60], [230, 70, 70], [70, 160, 230], [90, 200, 90], [240, 200, 60]],
)
max_iters = 360

model = dict(
    data_preprocessor=dict(size=(160, 160)),
    backbone=dict(drop_path_rate=0.0),  # too few steps for regularization
    neck=dict(out_channels=64),
    decode_head=dict(in_channels=[64, 64, 64, 64], channels=64, num_classes=5),
)

resize = dict(type='Resize', scale=(160, 160), keep_ratio=True)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    resize,
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    resize,
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    dataset=dict(
        type='BaseSegDataset',
        data_root=data_root,
        metainfo=metainfo,
        reduce_zero_label=True,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    num_workers=1,
    dataset=dict(
        type='BaseSegDataset',
        data_root=data_root,
        metainfo=metainfo,
        reduce_zero_label=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

optim_wrapper = dict(
    optimizer=dict(lr=1e-3, weight_decay=0.05), clip_grad=dict(max_norm=10, norm_type=2)
)
warm_up = min(20, max(1, max_iters // 10))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=warm_up),
    # without `end`, until the last iteration
    dict(type='PolyLR', power=0.9, eta_min=0.0, begin=warm_up, by_epoch=False),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(interval=max_iters))
auto_scale_lr = dict(base_batch_size=8)

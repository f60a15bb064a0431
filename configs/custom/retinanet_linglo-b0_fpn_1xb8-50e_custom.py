"""RetinaNet with LinGlo-b0 on your own boxes, in COCO format. Copy this file and set the first two variables.

docs/custom_dataset.md goes through it. Set the variables here, in the copy: what is derived from them below is not
derived again when a config that inherits from this one, or --cfg-options, changes only the variable.
"""

_base_ = '../coco/retinanet_linglo-b0_fpn_1x_coco.py'  # or -b1, -b2: nothing else changes

import colorsys  # noqa: E402  below _base_, or mmengine 0.10.7 takes this for a pure Python config

# ---- to be set
data_root = 'data/custom'  # holds train/, val/ and annotations/{train,val}.json
classes = ('cat', 'dog')  # names of the categories as in the annotation files, and in their order

# ---- to be set if need be
pretrained = None  # checkpoint of a LinGlo-b0 of any task; None trains from scratch
scale = (640, 640)  # pictures are resized to fit into it; larger for small objects
batch_size = 8
max_epochs = 50

# ---- follows from the above
palette = [
    tuple(round(255 * c) for c in colorsys.hsv_to_rgb(i / len(classes), 0.8, 0.9))
    for i in range(len(classes))
]
metainfo = dict(classes=classes, palette=palette)
init_cfg = dict(type='Pretrained', checkpoint=pretrained, prefix='backbone.')
model = dict(
    backbone=dict(init_cfg=None if pretrained is None else init_cfg),
    bbox_head=dict(num_classes=len(classes)),
)

resize = dict(type='Resize', scale=scale, keep_ratio=True)
train_pipeline = [*_base_.train_pipeline[:2], resize, *_base_.train_pipeline[3:]]
test_pipeline = [_base_.test_pipeline[0], resize, *_base_.test_pipeline[2:]]
train_dataloader = dict(
    batch_size=batch_size,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/train.json',
        data_prefix=dict(img='train/'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/val.json',
        data_prefix=dict(img='val/'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=f'{data_root}/annotations/val.json')
test_evaluator = val_evaluator

optim_wrapper = dict(
    # from scratch as in configs/quickstart, with weights as in configs/coco
    optimizer=dict(lr=1e-3 if pretrained is None else 1e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=10, norm_type=2),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    # without `end`, until the last epoch
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=max_epochs, val_interval=5)
default_hooks = dict(logger=dict(interval=10))
auto_scale_lr = dict(base_batch_size=batch_size)

"""SemanticFPN with LinGlo-b0 on your own label images. Copy this file and set the first two variables.

docs/custom_dataset.md goes through it. Set the variables here, in the copy: what is derived from them below is not
derived again when a config that inherits from this one, or --cfg-options, changes only the variable.
"""

_base_ = '../ade20k/fpn_linglo-b0_8xb4-40k_ade20k-512x512.py'  # or -b1, -b2: nothing else changes

import colorsys  # noqa: E402  below _base_, or mmengine 0.10.7 takes this for a pure Python config

# ---- to be set
# holds images/{training,validation}/ and annotations/{training,validation}/
data_root = 'data/custom'
classes = ('background', 'cat', 'dog')  # the name of label 0, of label 1, and so on

# ---- to be set if need be
# True: label 0 means unlabelled, `classes` starts with the name of label 1 (as ADE20K)
reduce_zero_label = False
# label of pixels without a class, neither trained nor evaluated; 255 with reduce_zero_label
ignore_index = 255
img_suffix = '.jpg'
seg_map_suffix = '.png'
pretrained = None  # checkpoint of a LinGlo-b0 of any task; None trains from scratch
crop_size = 512  # pixels, a multiple of 32; pictures are resized to about this short side
batch_size = 8
max_iters = 8000

# ---- follows from the above
palette = [
    tuple(round(255 * c) for c in colorsys.hsv_to_rgb(i / len(classes), 0.8, 0.9))
    for i in range(len(classes))
]
init_cfg = dict(type='Pretrained', checkpoint=pretrained, prefix='backbone.')
model = dict(
    data_preprocessor=dict(size=(crop_size, crop_size), seg_pad_val=ignore_index),
    backbone=dict(init_cfg=None if pretrained is None else init_cfg),
    decode_head=dict(num_classes=len(classes), ignore_index=ignore_index),
)

scale = (4 * crop_size, crop_size)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=scale, ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(
        type='RandomCrop',
        crop_size=(crop_size, crop_size),
        cat_max_ratio=0.75,
        ignore_index=ignore_index,
    ),
    *_base_.train_pipeline[4:],
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='ResizeToMultiple', size_divisor=32),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
dataset = dict(
    type='BaseSegDataset',
    data_root=data_root,
    metainfo=dict(classes=classes, palette=palette),
    reduce_zero_label=reduce_zero_label,
    ignore_index=ignore_index,
    img_suffix=img_suffix,
    seg_map_suffix=seg_map_suffix,
)
train_dataloader = dict(batch_size=batch_size, dataset=dict(dataset, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ignore_index=ignore_index)
test_evaluator = val_evaluator

optim_wrapper = dict(
    # from scratch as in configs/quickstart, with weights as in configs/ade20k
    optimizer=dict(lr=1e-3 if pretrained is None else 1e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=10, norm_type=2),
)
interval = max(1, max_iters // 10)  # of checkpoints and validations
warm_up = min(100, interval)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=warm_up),
    # without `end`, until the last iteration
    dict(type='PolyLR', power=0.9, eta_min=0.0, begin=warm_up, by_epoch=False),
]
train_cfg = dict(max_iters=max_iters, val_interval=interval)
default_hooks = dict(logger=dict(interval=min(50, interval)), checkpoint=dict(interval=interval))
auto_scale_lr = dict(base_batch_size=batch_size)

"""LinGlo-b0 classifier on your own class folders. Copy this file and set the first two variables.

docs/custom_dataset.md goes through it. Set the variables here, in the copy: what is derived from them below is not
derived again when a config that inherits from this one, or --cfg-options, changes only the variable.
"""

_base_ = '../imagenet/linglo-b0_8xb128_in1k.py'  # or -b1, -b2: nothing else changes

# ---- to be set
data_root = 'data/custom'  # holds train/<class>/ and val/<class>/
classes = sorted(['cat', 'dog'])  # names of the folders; labels follow them in this order

# ---- to be set if need be
pretrained = None  # checkpoint of a LinGlo-b0 of any task; None trains from scratch
img_size = 224  # pixels
batch_size = 64  # at most the number of training pictures; a last batch with fewer is left out
max_epochs = 100

# ---- follows from the above
init_cfg = dict(type='Pretrained', checkpoint=pretrained, prefix='backbone.')
model = dict(
    backbone=dict(init_cfg=None if pretrained is None else init_cfg),
    head=dict(num_classes=len(classes), topk=(1,)),
    train_cfg=dict(augments=None),  # Mixup and CutMix are for longer trainings
)
data_preprocessor = dict(num_classes=len(classes))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=img_size, backend='pillow', interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    # as 256 to 224
    dict(
        type='ResizeEdge',
        scale=img_size * 8 // 7,
        edge='short',
        backend='pillow',
        interpolation='bicubic',
    ),
    dict(type='CenterCrop', crop_size=img_size),
    dict(type='PackInputs'),
]
dataset = dict(type='CustomDataset', data_root=data_root, metainfo=dict(classes=classes))
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=4,
    drop_last=True,  # batch normalization cannot train on a last batch of a single small picture
    sampler=dict(_delete_=True, type='DefaultSampler', shuffle=True),
    dataset=dict(dataset, _delete_=True, data_prefix='train', pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=batch_size,
    num_workers=4,
    dataset=dict(dataset, _delete_=True, data_prefix='val', pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator

optim_wrapper = dict(
    # from scratch the ImageNet recipe's 1e-3 * (64 / 1024) ** 0.5
    optimizer=dict(lr=2.5e-4 if pretrained is None else 1e-4),
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

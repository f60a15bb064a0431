"""ImageNet-1K at 384 px; all else as in imagenet_bs128_deit_224.py.

The whole picture is resized for testing, without a crop, as in Swin's fine-tuning at 384 px (mmpretrain's
`imagenet_bs64_swin_384`).
"""

_base_ = './imagenet_bs128_deit_224.py'

train_pipeline = [
    _base_.train_pipeline[0],
    dict(type='RandomResizedCrop', scale=384, backend='pillow', interpolation='bicubic'),
    *_base_.train_pipeline[2:],
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=384, backend='pillow', interpolation='bicubic'),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=64,  # 8 GPUs x 64 = 512
    dataset=dict(pipeline=train_pipeline),
)
val_dataloader = dict(batch_size=64, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

"""CIFAR-10 at 96 px, batch 128 (not of the paper: a set small enough for one GPU or a CPU).

`data/cifar10/cifar-10-batches-py/`, the set's own pickles; mmpretrain downloads them (163 MB) if they are missing.
A copy of folders with pictures is read by cifar10_folder_bs128_96.py: name that file in this one's place.
"""

dataset_type = 'CIFAR10'
data_root = 'data/cifar10'
data_preprocessor = dict(
    num_classes=10,
    # the training set's, as in mmpretrain's CIFAR-10 recipes
    mean=[125.307, 122.961, 113.8575],
    std=[51.5865, 50.847, 51.255],
    to_rgb=False,  # the pickles are RGB already
)

# Three times its size, a picture leaves the last stage (stride 32) 3x3 positions; at 32 px there would be one, and
# neither attention nor convolution would have anything to mix.
resize = dict(type='Resize', scale=96, interpolation='bicubic')
train_pipeline = [
    # Shifts and flips, CIFAR-10's usual augmentation. RandAugment, Mixup, CutMix and random erasing are made for
    # hundreds of epochs; in these few the models hardly overfit.
    dict(type='RandomCrop', crop_size=32, padding=4),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    resize,  # last, since the steps before are cheaper on the small picture
    dict(type='PackInputs'),
]
test_pipeline = [resize, dict(type='PackInputs')]

train_dataloader = dict(
    batch_size=128,
    num_workers=2,
    persistent_workers=True,
    pin_memory=True,
    collate_fn=dict(type='default_collate'),
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type=dataset_type, data_root=data_root, split='train', pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=2,
    persistent_workers=True,
    pin_memory=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type=dataset_type, data_root=data_root, split='test', pipeline=test_pipeline),
)
val_evaluator = dict(type='Accuracy', topk=(1,))
test_dataloader = val_dataloader
test_evaluator = val_evaluator

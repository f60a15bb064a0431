"""CIFAR-10 as pictures, `data/cifar10/{train,test}/<class>/*`; all else as in cifar10_bs128_96.py."""

_base_ = './cifar10_bs128_96.py'

dataset_type = 'CustomDataset'
data_preprocessor = dict(to_rgb=True)  # files are read as BGR

train_pipeline = [dict(type='LoadImageFromFile'), *_base_.train_pipeline]
test_pipeline = [dict(type='LoadImageFromFile'), *_base_.test_pipeline]

train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type=dataset_type,
        data_root=_base_.data_root,
        data_prefix='train',
        pipeline=train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type=dataset_type,
        data_root=_base_.data_root,
        data_prefix='test',
        pipeline=test_pipeline,
    )
)
test_dataloader = val_dataloader

"""30 epochs of CIFAR-10, AdamW at batch 128: the paper's ImageNet schedule, scaled down."""

_base_ = './imagenet_bs1024_adamw_300e.py'

# The paper has 1e-3 at batch 1024. Adam's rate goes with the root of the batch: 1e-3 * (128 / 1024) ** 0.5.
optim_wrapper = dict(optimizer=dict(lr=3.5e-4))
param_scheduler = [
    # 3 % of the training, as the paper's 3 of 100 epochs
    dict(
        type='LinearLR',
        start_factor=1e-3,
        by_epoch=True,
        begin=0,
        end=0.9,
        convert_to_iter_based=True,
    ),
    # a hundredth at the end, as in the ImageNet recipe
    dict(
        type='CosineAnnealingLR',
        T_max=29.1,
        eta_min=3.5e-6,
        by_epoch=True,
        begin=0.9,
        end=30,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=30)

auto_scale_lr = dict(base_batch_size=128)

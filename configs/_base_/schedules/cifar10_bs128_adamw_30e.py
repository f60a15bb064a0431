"""30 epochs of CIFAR-10, AdamW at batch 128: the paper's ImageNet schedule, scaled down.

For another length `train_cfg.max_epochs` (2 or more) is all that changes.
"""

_base_ = './imagenet_bs1024_adamw_300e.py'

# The paper has 1e-3 at batch 1024. Adam's rate goes with the root of the batch: 1e-3 * (128 / 1024) ** 0.5.
optim_wrapper = dict(optimizer=dict(lr=3.5e-4))
param_scheduler = [
    # 1 of 30 epochs, as the paper's 3 of 100
    dict(
        type='LinearLR',
        start_factor=1e-3,
        by_epoch=True,
        begin=0,
        end=1,
        convert_to_iter_based=True,
    ),
    # without `end`, until the last epoch; down to a hundredth, as in the ImageNet recipe
    dict(
        type='CosineAnnealingLR',
        eta_min=3.5e-6,
        by_epoch=True,
        begin=1,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=30)

auto_scale_lr = dict(base_batch_size=128)

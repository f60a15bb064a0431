"""The ablations' schedule: 100 epochs, 3 of linear warm-up, the rest as in 300 epochs (paper Sec. 5)."""

_base_ = './imagenet_bs1024_adamw_300e.py'

param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-3,
        by_epoch=True,
        begin=0,
        end=3,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        T_max=97,
        eta_min=1e-5,
        by_epoch=True,
        begin=3,
        end=100,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=100)

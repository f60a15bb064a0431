"""Training from the weights of another network: 30 epochs, 1 of linear warm-up, the rest as in 300 epochs.

Not of the paper. The rate is the full one, since much has to be learnt anew.
"""

_base_ = './imagenet_bs1024_adamw_300e.py'

param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-3,
        by_epoch=True,
        begin=0,
        end=1,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        T_max=29,
        eta_min=1e-5,
        by_epoch=True,
        begin=1,
        end=30,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=30)

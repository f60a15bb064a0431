"""36 epochs, x0.1 after 27 and 33, AdamW at batch 16, no weight decay on norms.

PVT v2's published 3x recipes; the warm-up is schedule_1x_adamw.py's, as in theirs.
"""

_base_ = './schedule_1x_adamw.py'

optim_wrapper = dict(
    optimizer=dict(betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(type='MultiStepLR', begin=0, end=36, by_epoch=True, milestones=[27, 33], gamma=0.1),
]
train_cfg = dict(max_epochs=36)

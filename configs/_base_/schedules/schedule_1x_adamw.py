"""12 epochs, x0.1 after 8 and 11, AdamW at batch 16 (paper Sec. 4.2)."""

optim_wrapper = dict(
    type='OptimWrapper',
    # lr: paper; weight_decay: PVT's published code, the paper is silent
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=1e-4),
)
param_scheduler = [
    # 500 iterations of warm-up as in every 1x schedule of mmdet, PVT's included; the paper is silent
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

auto_scale_lr = dict(enable=False, base_batch_size=16)  # 8 GPUs x 2

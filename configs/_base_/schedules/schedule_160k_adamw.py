"""160k iterations, 1500 of warm-up, linear decay, AdamW at batch 16, no weight decay on norms.

mmseg's `swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512`.
"""

_base_ = './schedule_40k_adamw.py'

optim_wrapper = dict(
    optimizer=dict(lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, begin=1500, end=160000, by_epoch=False),
]
train_cfg = dict(max_iters=160000, val_interval=16000)

auto_scale_lr = dict(base_batch_size=16)  # 8 GPUs x 2

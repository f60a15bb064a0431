"""300 epochs, 5 of linear warm-up, cosine decay, AdamW at batch 1024 (paper Sec. 4.1)."""

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(
        type='AdamW',
        lr=1e-3,  # paper; equal to DeiT's 5e-4 * 1024 / 512
        weight_decay=0.05,
        betas=(0.9, 0.999),
        eps=1e-8,
    ),
    # DeiT, through timm: no weight decay on norms and biases
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = [
    # DeiT: warmup-lr 1e-6 = 1e-3 * 1e-3
    dict(
        type='LinearLR',
        start_factor=1e-3,
        by_epoch=True,
        begin=0,
        end=5,
        convert_to_iter_based=True,
    ),
    # DeiT: min-lr 1e-5
    dict(
        type='CosineAnnealingLR',
        T_max=295,
        eta_min=1e-5,
        by_epoch=True,
        begin=5,
        end=300,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
val_cfg = dict()
test_cfg = dict()

auto_scale_lr = dict(enable=False, base_batch_size=1024)  # 8 GPUs x 128

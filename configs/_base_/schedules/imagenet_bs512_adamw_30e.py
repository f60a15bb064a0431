"""Fine-tuning at a larger size: 30 epochs, 5 of linear warm-up, cosine decay, AdamW at batch 512.

Swin's published `swin_base_patch4_window12_384_finetune`, whose rates are those of batch 512.
"""

_base_ = './imagenet_bs1024_adamw_300e.py'

optim_wrapper = dict(optimizer=dict(lr=2e-5, weight_decay=1e-8))
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-3,
        by_epoch=True,
        begin=0,
        end=5,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        T_max=25,
        eta_min=2e-7,
        by_epoch=True,
        begin=5,
        end=30,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=30)

auto_scale_lr = dict(base_batch_size=512)  # 8 GPUs x 64

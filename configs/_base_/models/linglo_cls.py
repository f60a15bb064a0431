"""LinGlo classifier: global average pooling and one linear layer (paper Sec. 3.4, 4.1)."""

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmlinglo.LinGlo',
        arch='b0',
        out_indices=(3,),
        drop_path_rate=0.1,  # DeiT's stochastic depth
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=256,
        # DeiT's label smoothing
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02),
    ),
    # DeiT's Mixup and CutMix, one of the two drawn for each batch
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)

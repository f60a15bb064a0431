"""SemanticFPN (paper Sec. 4.3): mmseg's `fpn_r50` with LinGlo in it, new layers from Xavier as the paper says."""

norm_cfg = dict(type='BN', requires_grad=True)  # SyncBN when distributed, see `sync_bn`
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(512, 512),
    ),
    backbone=dict(
        type='mmlinglo.LinGlo',
        arch='b0',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.1,  # as in PVT's segmentation code; the paper is silent
    ),
    neck=dict(
        type='FPN',
        in_channels=[32, 64, 160, 256],
        out_channels=256,
        num_outs=4,
        init_cfg=dict(type='Xavier', layer='Conv2d', distribution='uniform'),
    ),
    decode_head=dict(
        type='FPNHead',
        in_channels=[256, 256, 256, 256],
        in_index=[0, 1, 2, 3],
        feature_strides=[4, 8, 16, 32],
        channels=128,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
        init_cfg=dict(type='Xavier', layer='Conv2d', distribution='uniform'),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)

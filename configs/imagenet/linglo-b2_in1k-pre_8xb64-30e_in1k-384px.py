"""LinGlo-b2 on ImageNet-1K at 384 px, 30 epochs from the weights of 224 px. Not yet trained by this project.

Not of the paper: Swin's published schedule of fine-tuning at 384 px, the 224 px recipe's augmentation.

bash tools/dist_train.sh configs/imagenet/linglo-b2_in1k-pre_8xb64-30e_in1k-384px.py 8
"""

_base_ = [
    '../_base_/models/linglo_cls.py',
    '../_base_/datasets/imagenet_bs64_deit_384.py',
    '../_base_/schedules/imagenet_bs512_adamw_30e.py',
    '../_base_/default_runtime_cls.py',
]

# where the 224 px recipe leaves its weights
pretrained = 'work_dirs/linglo-b2_8xb128_in1k/epoch_300.pth'
model = dict(
    backbone=dict(
        arch='b2',
        init_cfg=dict(type='Pretrained', checkpoint=pretrained, prefix='backbone.'),
    ),
    head=dict(
        in_channels=512,
        init_cfg=dict(_delete_=True, type='Pretrained', checkpoint=pretrained, prefix='head.'),
    ),
)

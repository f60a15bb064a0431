"""LinGlo-b1 on ImageNet-1K, 30 epochs from PVTv2-B1's public weights (not of the paper). Not yet trained by this project.

python tools/model_converters/pvtv2_to_linglo.py configs/imagenet/linglo-b1_pvtv2-init_8xb128-30e_in1k.py \
    PVTV2_CHECKPOINT work_dirs/pvtv2-init/linglo-b1.pth
bash tools/dist_train.sh configs/imagenet/linglo-b1_pvtv2-init_8xb128-30e_in1k.py 8
"""

_base_ = [
    '../_base_/models/linglo_cls.py',
    '../_base_/datasets/imagenet_bs128_deit_224.py',
    '../_base_/schedules/imagenet_bs1024_adamw_30e.py',
    '../_base_/default_runtime_cls.py',
]

checkpoint = 'work_dirs/pvtv2-init/linglo-b1.pth'
model = dict(
    backbone=dict(
        arch='b1',
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.'),
    ),
    head=dict(
        in_channels=512,
        init_cfg=dict(_delete_=True, type='Pretrained', checkpoint=checkpoint, prefix='head.'),
    ),
)

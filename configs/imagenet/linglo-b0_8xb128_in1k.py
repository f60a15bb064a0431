"""LinGlo-b0 on ImageNet-1K, 300 epochs (paper Sec. 4.1, Table 2: top-1 72.5). Not yet trained by this project.

bash tools/dist_train.sh configs/imagenet/linglo-b0_8xb128_in1k.py 8
"""

_base_ = [
    '../_base_/models/linglo_cls.py',
    '../_base_/datasets/imagenet_bs128_deit_224.py',
    '../_base_/schedules/imagenet_bs1024_adamw_300e.py',
    '../_base_/default_runtime_cls.py',
]

model = dict(backbone=dict(arch='b0'), head=dict(in_channels=256))

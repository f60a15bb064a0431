"""RP-CPE, key-only attention, H-H-H-H: the reference row of Tables 5 and 6 (paper: top-1 69.7) and of Fig. 5.

bash tools/dist_train.sh configs/ablations/linglo-b0_8xb128-100e_in1k.py 8
"""

_base_ = [
    '../_base_/models/linglo_cls.py',
    '../_base_/datasets/imagenet_bs128_deit_224.py',
    '../_base_/schedules/imagenet_bs1024_adamw_100e.py',
    '../_base_/default_runtime_cls.py',
]

model = dict(backbone=dict(arch='b0'), head=dict(in_channels=256))

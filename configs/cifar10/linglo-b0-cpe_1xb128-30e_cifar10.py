"""Table 6, CPE: one convolution branch, no skip."""

_base_ = './linglo-b0_1xb128-30e_cifar10.py'

model = dict(backbone=dict(pos_encoding='CPE'))

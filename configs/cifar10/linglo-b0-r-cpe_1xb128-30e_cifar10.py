"""Table 6, R-CPE: one convolution branch and the skip."""

_base_ = './linglo-b0_1xb128-30e_cifar10.py'

model = dict(backbone=dict(pos_encoding='R-CPE'))

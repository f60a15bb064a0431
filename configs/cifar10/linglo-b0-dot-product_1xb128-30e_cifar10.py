"""Fig. 4: dot-product attention in place of key-only."""

_base_ = './linglo-b0_1xb128-30e_cifar10.py'

model = dict(backbone=dict(attention='dot_product'))

"""Table 5, C-H-H-H: convolutional blocks with SE in stage 1."""

_base_ = './linglo-b0_1xb128-30e_cifar10.py'

model = dict(backbone=dict(layout='C-H-H-H'))

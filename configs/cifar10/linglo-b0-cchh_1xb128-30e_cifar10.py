"""Table 5, C-C-H-H: convolutional blocks with SE in stages 1 and 2."""

_base_ = './linglo-b0_1xb128-30e_cifar10.py'

model = dict(backbone=dict(layout='C-C-H-H'))

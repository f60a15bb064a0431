"""ResNet18 under the recipe of LinGlo-b0."""

_base_ = './linglo-b0_1xb128-30e_cifar10.py'

model = dict(backbone=dict(_delete_=True, type='ResNet', depth=18), head=dict(in_channels=512))

"""Fig. 5, LinGlo-w/o-C: patches without overlap, no RP-CPE, absolute position encoding."""

_base_ = './linglo-b0_1xb128-30e_cifar10.py'

model = dict(backbone=dict(overlap=False, pos_encoding='absolute', img_size=96))

# DeiT: no weight decay on the position embedding
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(pos_embed=dict(decay_mult=0.0))))

"""Fig. 5, LinGlo-w/o-CH: as w/o-C, but 16x16 patches and no hierarchy."""

_base_ = './linglo-b0-wo-c_1xb128-30e_cifar10.py'

model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True,  # the base has a string
            embed_dims=(150, 150, 150, 150),
            depths=(2, 3, 3, 2),
            num_heads=(3, 3, 3, 3),
            mlp_ratio=(8, 8, 4, 4),
            strides=(16, 1, 1, 1),
        ),
    ),
    head=dict(in_channels=150),
)

"""Fig. 5, LinGlo-w/o-CH: as w/o-C, but 16x16 patches and no hierarchy (paper: a curve).

bash tools/dist_train.sh configs/ablations/linglo-b0-wo-ch_8xb128-100e_in1k.py 8
"""

_base_ = './linglo-b0_8xb128-100e_in1k.py'

# 150 channels and 3 heads throughout; depths and FFN ratios stay those of b0, which gives about b0's parameters.
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
        overlap=False,
        pos_encoding='absolute',
    ),
    head=dict(in_channels=150),
)

# DeiT: no weight decay on the position embedding
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(pos_embed=dict(decay_mult=0.0))))

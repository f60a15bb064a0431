"""Fig. 5, LinGlo-w/o-C: patches without overlap, no RP-CPE, absolute position encoding (paper: a curve).

bash tools/dist_train.sh configs/ablations/linglo-b0-wo-c_8xb128-100e_in1k.py 8
"""

_base_ = './linglo-b0_8xb128-100e_in1k.py'

model = dict(backbone=dict(overlap=False, pos_encoding='absolute'))

# DeiT: no weight decay on the position embedding
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(pos_embed=dict(decay_mult=0.0))))

"""Fig. 4: dot-product attention in place of key-only (the paper gives latency and memory, no accuracy).

bash tools/dist_train.sh configs/ablations/linglo-b0-dot-product_8xb128-100e_in1k.py 8
"""

_base_ = './linglo-b0_8xb128-100e_in1k.py'

model = dict(backbone=dict(attention='dot_product'))

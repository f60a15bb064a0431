"""Table 5, C-H-H-H: convolutional blocks with SE in stage 1 (paper: top-1 68.8).

bash tools/dist_train.sh configs/ablations/linglo-b0-chhh_8xb128-100e_in1k.py 8
"""

_base_ = './linglo-b0_8xb128-100e_in1k.py'

model = dict(backbone=dict(layout='C-H-H-H'))

"""Table 5, C-C-H-H: convolutional blocks with SE in stages 1 and 2 (paper: top-1 67.2).

bash tools/dist_train.sh configs/ablations/linglo-b0-cchh_8xb128-100e_in1k.py 8
"""

_base_ = './linglo-b0_8xb128-100e_in1k.py'

model = dict(backbone=dict(layout='C-C-H-H'))

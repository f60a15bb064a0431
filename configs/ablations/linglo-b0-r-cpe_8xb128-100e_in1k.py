"""Table 6, R-CPE: one convolution branch and the skip (paper: top-1 69.2).

bash tools/dist_train.sh configs/ablations/linglo-b0-r-cpe_8xb128-100e_in1k.py 8
"""

_base_ = './linglo-b0_8xb128-100e_in1k.py'

model = dict(backbone=dict(pos_encoding='R-CPE'))

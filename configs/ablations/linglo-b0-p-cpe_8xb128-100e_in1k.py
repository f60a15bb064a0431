"""Table 6, P-CPE: four convolution branches, no skip (paper: top-1 69.3).

bash tools/dist_train.sh configs/ablations/linglo-b0-p-cpe_8xb128-100e_in1k.py 8
"""

_base_ = './linglo-b0_8xb128-100e_in1k.py'

model = dict(backbone=dict(pos_encoding='P-CPE'))

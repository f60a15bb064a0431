"""Table 6, CPE: one convolution branch, no skip (paper: top-1 68.5).

bash tools/dist_train.sh configs/ablations/linglo-b0-cpe_8xb128-100e_in1k.py 8
"""

_base_ = './linglo-b0_8xb128-100e_in1k.py'

model = dict(backbone=dict(pos_encoding='CPE'))

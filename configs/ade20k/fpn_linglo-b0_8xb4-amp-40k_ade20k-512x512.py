"""fpn_linglo-b0_8xb4-40k_ade20k-512x512 in mixed precision. Not yet trained by this project.

Not of the paper.

bash tools/dist_train.sh configs/ade20k/fpn_linglo-b0_8xb4-amp-40k_ade20k-512x512.py 8
"""

_base_ = './fpn_linglo-b0_8xb4-40k_ade20k-512x512.py'

optim_wrapper = dict(type='AmpOptimWrapper')

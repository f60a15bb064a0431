"""linglo-b1_8xb128_in1k in mixed precision. Not yet trained by this project.

Not of the paper.

bash tools/dist_train.sh configs/imagenet/linglo-b1_8xb128-amp_in1k.py 8
"""

_base_ = './linglo-b1_8xb128_in1k.py'

optim_wrapper = dict(type='AmpOptimWrapper')

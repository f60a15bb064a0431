"""retinanet_linglo-b0_fpn_1x_coco in mixed precision. Not yet trained by this project.

Not of the paper.

bash tools/dist_train.sh configs/coco/retinanet_linglo-b0_fpn_amp-1x_coco.py 8
"""

_base_ = './retinanet_linglo-b0_fpn_1x_coco.py'

optim_wrapper = dict(type='AmpOptimWrapper')

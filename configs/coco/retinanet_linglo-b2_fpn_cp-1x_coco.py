"""retinanet_linglo-b2_fpn_1x_coco with gradient checkpointing. Not yet trained by this project.

Not of the paper. The backward pass recomputes the backbone's blocks: the same results from less memory, in more time.

bash tools/dist_train.sh configs/coco/retinanet_linglo-b2_fpn_cp-1x_coco.py 8
"""

_base_ = './retinanet_linglo-b2_fpn_1x_coco.py'

model = dict(backbone=dict(with_cp=True))

"""RetinaNet with LinGlo-b1 on COCO, 1x, from PVTv2-B1's public weights. Not yet trained by this project.

Not of the paper: the paper's recipe from another start, for which no ImageNet training of LinGlo is needed. The
weights are converted when the training starts, with pictures of the training set, whose labels are not read.
It needs timm.

bash tools/dist_train.sh configs/coco/retinanet_linglo-b1_pvtv2-init_fpn_1x_coco.py 8
"""

_base_ = './retinanet_linglo-b1_fpn_1x_coco.py'

pretrained = 'https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b1.pth'
model = dict(
    backbone=dict(
        init_cfg=dict(
            _delete_=True,
            type='mmlinglo.PVTv2Init',
            checkpoint=pretrained,
            images='data/coco/train2017',
        )
    )
)

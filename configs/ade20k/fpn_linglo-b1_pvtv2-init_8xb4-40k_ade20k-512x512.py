"""SemanticFPN with LinGlo-b1 on ADE20K, 40k, from PVTv2-B1's public weights. Not yet trained by this project.

Not of the paper: the paper's recipe from another start, for which no ImageNet training of LinGlo is needed. The
weights are converted when the training starts, with pictures of the training set, whose labels are not read.
It needs timm.

bash tools/dist_train.sh configs/ade20k/fpn_linglo-b1_pvtv2-init_8xb4-40k_ade20k-512x512.py 8
"""

_base_ = './fpn_linglo-b1_8xb4-40k_ade20k-512x512.py'

pretrained = 'https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b1.pth'
model = dict(
    backbone=dict(
        init_cfg=dict(
            _delete_=True,
            type='mmlinglo.PVTv2Init',
            checkpoint=pretrained,
            images='data/ade/ADEChallengeData2016/images/training',
        )
    )
)

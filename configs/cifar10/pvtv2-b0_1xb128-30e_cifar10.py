"""PVTv2-B0 under the recipe of LinGlo-b0. timm's, since mmdet's returns a list, which mmpretrain's neck refuses."""

_base_ = './linglo-b0_1xb128-30e_cifar10.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='TIMMBackbone',
        model_name='pvt_v2_b0',
        features_only=True,
        out_indices=(3,),
    )
)

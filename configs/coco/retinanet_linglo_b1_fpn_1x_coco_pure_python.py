# ruff: noqa: F403, F405
"""retinanet_linglo-b1_fpn_1x_coco as a pure Python config: types are classes, which an editor can follow.

The same training. The name has no dashes, so that other configs can import it. Not yet trained by this project.

bash tools/dist_train.sh configs/coco/retinanet_linglo_b1_fpn_1x_coco_pure_python.py 8
"""

from mmengine.config import read_base

with read_base():
    from .._base_.pure_python.coco_detection import *
    from .._base_.pure_python.default_runtime_det import *
    from .._base_.pure_python.retinanet_linglo_fpn import *
    from .._base_.pure_python.schedule_1x_adamw import *

# where the ImageNet recipe leaves its weights; None trains from scratch
pretrained = 'work_dirs/linglo-b1_8xb128_in1k/epoch_300.pth'
model.update(
    dict(
        backbone=dict(
            arch='b1',
            init_cfg=dict(type='Pretrained', checkpoint=pretrained, prefix='backbone.'),
        ),
        neck=dict(in_channels=[128, 320, 512]),
    )
)

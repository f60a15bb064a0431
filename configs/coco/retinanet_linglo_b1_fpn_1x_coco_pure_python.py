# ruff: noqa: F403, F405
"""retinanet_linglo-b1_fpn_1x_coco as a pure Python config: imports in place of `_base_`, classes as types.

The same training. The name has no dashes, so that other configs can import it. Not yet trained by this project.

bash tools/dist_train.sh configs/coco/retinanet_linglo_b1_fpn_1x_coco_pure_python.py 8
"""

from mmdet.engine.hooks import DetVisualizationHook
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import read_base
from mmengine.runner import LogProcessor

from mmlinglo import LinGlo

with read_base():
    from .._base_.datasets.coco_detection import *
    from .._base_.default_runtime import *
    from .._base_.models.retinanet_linglo_fpn import *
    from .._base_.schedules.schedule_1x_adamw import *

default_scope = 'mmdet'
default_hooks.update(visualization=dict(type=DetVisualizationHook))
default_hooks.checkpoint.update(save_best='coco/bbox_mAP', rule='greater')
visualizer = dict(type=DetLocalVisualizer, vis_backends=vis_backends, name='visualizer')
log_processor = dict(type=LogProcessor, window_size=50, by_epoch=True)

# where the ImageNet recipe leaves its weights; None trains from scratch
pretrained = 'work_dirs/linglo-b1_8xb128_in1k/epoch_300.pth'
model.backbone.update(
    type=LinGlo,
    arch='b1',
    init_cfg=dict(type='Pretrained', checkpoint=pretrained, prefix='backbone.'),
)
model.neck.update(in_channels=[128, 320, 512])

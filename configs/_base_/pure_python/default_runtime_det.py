"""default_runtime_det.py with classes as types."""

from mmdet.engine.hooks import DetVisualizationHook
from mmdet.visualization import DetLocalVisualizer
from mmengine.hooks import DistSamplerSeedHook, IterTimerHook, LoggerHook, ParamSchedulerHook
from mmengine.runner import LogProcessor
from mmengine.visualization import LocalVisBackend

from mmlinglo.engine import (
    NonFiniteLossHook,
    PictureErrorsHook,
    ReseedHook,
    SafeCheckpointHook,
)

default_scope = 'mmdet'
default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, interval=50),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(
        type=SafeCheckpointHook,
        interval=1,
        max_keep_ckpts=3,
        save_best='coco/bbox_mAP',
        rule='greater',
    ),
    sampler_seed=dict(type=DistSamplerSeedHook),
    reseed=dict(type=ReseedHook),
    picture_errors=dict(type=PictureErrorsHook),
    non_finite=dict(type=NonFiniteLossHook, action='stop'),
    visualization=dict(type=DetVisualizationHook),
)

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl', timeout=1800),
)
sync_bn = 'torch'

vis_backends = [dict(type=LocalVisBackend)]
visualizer = dict(type=DetLocalVisualizer, vis_backends=vis_backends, name='visualizer')
log_processor = dict(type=LogProcessor, window_size=50, by_epoch=True)
log_level = 'INFO'
load_from = None
resume = False

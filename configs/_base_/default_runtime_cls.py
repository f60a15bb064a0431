_base_ = './default_runtime.py'

default_scope = 'mmpretrain'
default_hooks = dict(
    logger=dict(interval=100),
    checkpoint=dict(save_best='accuracy/top1', rule='greater'),
    visualization=dict(type='VisualizationHook', enable=False),
)
env_cfg = dict(cudnn_benchmark=True)  # all inputs have the same size
visualizer = dict(type='UniversalVisualizer', vis_backends=_base_.vis_backends)

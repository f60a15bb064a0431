"""What the three toolboxes have in common; values are OpenMMLab's defaults unless a comment says why."""

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    # The last checkpoint is what the COCO and ADE20K recipes start from; the best one is kept beside it.
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=3),
    sampler_seed=dict(type='DistSamplerSeedHook'),
)

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)

# RP-CPE has batch norms in every block and mmengine does not synchronise plain ones between GPUs.
# This turns them into SyncBN when training is distributed and does nothing when it is not.
sync_bn = 'torch'

vis_backends = [dict(type='LocalVisBackend')]
log_level = 'INFO'
load_from = None
resume = False

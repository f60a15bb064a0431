"""What the three toolboxes have in common; values are OpenMMLab's defaults unless a comment says why."""

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    # The last checkpoint is what the COCO and ADE20K recipes start from; the best one is kept beside it.
    # mmlinglo's hook writes whole files only and removes none before the next is on the disk.
    checkpoint=dict(type='mmlinglo.SafeCheckpointHook', interval=1, max_keep_ckpts=3),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    reseed=dict(type='mmlinglo.ReseedHook'),  # a resumed run draws what an uninterrupted one would
    picture_errors=dict(type='mmlinglo.PictureErrorsHook'),
    non_finite=dict(type='mmlinglo.NonFiniteLossHook', action='stop'),  # or 'skip'
)

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    # Seconds until a process that waits in vain for another one gives up. Longer than rank 0 computes COCO's metrics.
    dist_cfg=dict(backend='nccl', timeout=1800),
)

# RP-CPE has batch norms in every block and mmengine does not synchronise plain ones between GPUs.
# This turns them into SyncBN when training is distributed and does nothing when it is not.
sync_bn = 'torch'

vis_backends = [dict(type='LocalVisBackend')]
log_level = 'INFO'
load_from = None
resume = False

"""LinGlo-b0 on CIFAR-10 at 96 px, 30 epochs: the reference of the small replication of the paper's ablations.

    python tools/train.py configs/cifar10/linglo-b0_1xb128-30e_cifar10.py

All rows, with seeds and a table: python tools/analysis_tools/run_ablations.py
"""

_base_ = [
    '../_base_/models/linglo_cls.py',
    '../_base_/datasets/cifar10_bs128_96.py',
    '../_base_/schedules/cifar10_bs128_adamw_30e.py',
    '../_base_/default_runtime_cls.py',
]

model = dict(
    # Too few steps for stochastic depth, Mixup and CutMix; label smoothing 0.1 stays as in the paper's recipe.
    backbone=dict(drop_path_rate=0.0),
    head=dict(num_classes=10, topk=(1,)),
    train_cfg=None,
)
# The test set chooses no checkpoint: what counts is the last epoch. Two are kept, so that a training that was
# interrupted in a validation goes on from before it.
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2, save_best=None))

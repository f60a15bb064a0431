"""SegFormer head with LinGlo-b1 on ADE20K, 160k. Not yet trained by this project.

Not of the paper: mmseg's `segformer_mit-b1_8xb2-160k_ade20k-512x512`, tested at multiples of 32.

bash tools/dist_train.sh configs/ade20k/segformer_linglo-b1_8xb2-160k_ade20k-512x512.py 8
"""

_base_ = [
    '../_base_/models/segformer_linglo.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/schedule_160k_adamw_segformer.py',
    '../_base_/default_runtime_seg.py',
]

# where the ImageNet recipe leaves its weights; None trains from scratch
pretrained = 'work_dirs/linglo-b1_8xb128_in1k/epoch_300.pth'
model = dict(
    backbone=dict(
        arch='b1',
        init_cfg=dict(type='Pretrained', checkpoint=pretrained, prefix='backbone.'),
    ),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
)
train_dataloader = dict(batch_size=2)  # 8 GPUs x 2 = 16

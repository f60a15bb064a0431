"""schedule_160k_adamw.py with ten times the rate in the head: mmseg's `segformer_mit-b0_8xb2-160k_ade20k-512x512`."""

_base_ = './schedule_160k_adamw.py'

optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(head=dict(lr_mult=10.0))))

"""schedule_1x_adamw.py with the rate of PVT's published Mask R-CNN recipes."""

_base_ = './schedule_1x_adamw.py'

optim_wrapper = dict(optimizer=dict(lr=2e-4))

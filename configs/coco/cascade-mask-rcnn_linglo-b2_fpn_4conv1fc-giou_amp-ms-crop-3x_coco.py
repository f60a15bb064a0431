"""cascade-mask-rcnn_linglo-b2_fpn_4conv1fc-giou_ms-crop-3x_coco in mixed precision. Not yet trained by this project.

Not of the paper: PVT v2's published `cascade_mask_rcnn_pvt_v2_b2_fpn_3x_mstrain_fp16`.

bash tools/dist_train.sh configs/coco/cascade-mask-rcnn_linglo-b2_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py 8
"""

_base_ = './cascade-mask-rcnn_linglo-b2_fpn_4conv1fc-giou_ms-crop-3x_coco.py'

optim_wrapper = dict(type='AmpOptimWrapper')

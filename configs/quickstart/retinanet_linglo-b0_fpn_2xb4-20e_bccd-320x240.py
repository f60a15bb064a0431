"""The quickstart's small detector on real images: blood cells (BCCD, 292 images), in COCO format under `data_root`.

bash tools/dist_train.sh configs/quickstart/retinanet_linglo-b0_fpn_2xb4-20e_bccd-320x240.py 2

For your own data, copy configs/custom/retinanet_linglo-b0_fpn_1xb8-50e_custom.py instead: see docs/custom_dataset.md.
"""

_base_ = './retinanet_linglo-b0_fpn_2xb4-3e_shapes.py'

data_root = 'data/bccd/'  # holds train/, val/ and annotations/{train,val}.json
metainfo = dict(classes=('RBC', 'WBC', 'Platelets'))
resize = dict(type='Resize', scale=(320, 240), keep_ratio=True)
train_pipeline = [*_base_.train_pipeline[:2], resize, *_base_.train_pipeline[3:]]
test_pipeline = [_base_.test_pipeline[0], resize, *_base_.test_pipeline[2:]]
model = dict(bbox_head=dict(num_classes=len(metainfo['classes'])))
train_dataloader = dict(
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline)
)
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/val.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=20, val_interval=5)

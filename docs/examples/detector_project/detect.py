# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""python detect.py CONFIG CHECKPOINT PICTURE: the five surest boxes, by mmdet's Python interface."""

import sys

from mmdet.apis import inference_detector, init_detector

config, checkpoint, picture = sys.argv[1:]
unsure_too = {'model.test_cfg.score_thr': 0.0}
model = init_detector(config, checkpoint, device='cpu', cfg_options=unsure_too)
boxes = inference_detector(model, picture).pred_instances[:5]
for label, score, box in zip(boxes.labels, boxes.scores, boxes.bboxes):
    name = model.dataset_meta['classes'][label]
    print(f'{name} {score:.3f} at {[round(x) for x in box.tolist()]}')  # noqa: T201

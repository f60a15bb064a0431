# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Print the five boxes with the highest scores: python detect.py CONFIG CHECKPOINT IMAGE"""

import sys

from mmdet.apis import inference_detector, init_detector

config, checkpoint, image = sys.argv[1:]
all_scores = {'model.test_cfg.score_thr': 0.0}
model = init_detector(config, checkpoint, device='cpu', cfg_options=all_scores)
boxes = inference_detector(model, image).pred_instances[:5]
for label, score, box in zip(boxes.labels, boxes.scores, boxes.bboxes):
    name = model.dataset_meta['classes'][label]
    print(f'{name} {score:.3f} at {[round(x) for x in box.tolist()]}')  # noqa: T201

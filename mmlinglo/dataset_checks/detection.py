# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Check boxes and masks in COCO format.

mmdet silently leaves out boxes that it cannot use: boxes of categories that are not among the
classes, boxes without width, height or area, and boxes outside their image. The COCO evaluation
reads the file itself and counts the latter as missed. mmdet numbers its labels in the order of
the categories in the file (``get_cat_ids`` of its COCO API), not in the order of the classes.
"""

import difflib
import itertools
import os.path as osp
import reprlib
from collections import Counter
from typing import Dict, List

import numpy as np
from mmengine.config import Config

from mmlinglo.utils.cli import type_name

from . import coco
from .splits import Opener, Split, size

COUNTED = 100  # boxes per image and class in the COCO evaluation's mAP


def check(cfg: Config, splits: List[Split], open_samples: Opener) -> None:
    """Check data sets of mmdet."""
    from mmdet.datasets import CocoDataset, CocoPanopticDataset

    names: Dict[str, List[str]] = {}
    for split in splits:
        dataset = split.dataset
        if isinstance(dataset, CocoDataset) and not isinstance(dataset, CocoPanopticDataset):
            check_coco(cfg, split, names)
        else:
            split.add('dataset-unknown', type(dataset).__name__)
            samples = split.load('dataset-unbuildable')
            split.samples = samples and [dict(img_path=s.get('img_path')) for s in samples]
        open_samples(split)


def check_coco(cfg: Config, split: Split, names: Dict[str, List[str]]) -> None:
    """Check an annotation file in COCO format. ``names`` holds the categories of the earlier ones."""
    path, evaluators = split.dataset.ann_file, split.evaluators
    for name, evaluator in evaluators:
        other = evaluator.get('ann_file')
        if other is not None and osp.realpath(other) != osp.realpath(path):
            split.add('evaluator-file', f'{name}.ann_file = {other!r}, the data set reads {path!r}')
    metrics = [metric for _, metric in evaluators if not metric.get('format_only')]
    unlabelled = bool(evaluators) and not metrics
    content = coco.read(split, ('annotations',) if unlabelled else ())
    if content is None:
        return
    theirs = names[split.name] = list(dict.fromkeys(content.categories.values()))
    for other, categories in names.items():
        if theirs != categories and set(theirs) == set(categories):
            split.add('categories-differ', f'{other}: {categories}, {split.name}: {theirs}')
    metrics = [metric for metric in metrics if type_name(metric['type']) == 'CocoMetric']
    # Without ann_file, the metric writes its own file.
    evaluated = any(metric.get('ann_file') for metric in metrics)
    check_categories(split, content, theirs)
    check_classes(split, content, evaluated)
    if evaluated:
        check_evaluation(cfg, content)
    sound = check_boxes(content)
    if split.step('LoadAnnotations').get('with_mask') or any(
        'segm' in metric.get('metric', 'bbox') for metric in metrics
    ):
        check_masks(split, content, sound)
    split.used = list(content.images)
    if content.annotations or not unlabelled:
        check_left(split, content)
    split.count(boxes=len(content.annotations))
    folder, rest = split.prefix('img'), dict(img_id=0, instances=[])
    if folder is not None:
        split.samples = [
            dict(rest, img_path=osp.join(folder, i.file_name), height=i.height, width=i.width)
            for i in content.images.values()
        ]


def check_categories(split: Split, content: coco.Coco, names: List[str]) -> None:
    """Compare the categories with the classes of the config."""
    classes = list(split.classes)
    lowered = {name.strip().lower(): name for name in names}
    for name in classes:
        if name not in names:
            close = difflib.get_close_matches(str(name).strip().lower(), lowered, n=1)
            hint = f' (did you mean {lowered[close[0]]!r}?)' if close else ''
            content.add('class-missing', f'no category {name!r}{hint}')
    used = [name for name in names if name in classes]
    if used != [name for name in classes if name in names]:
        content.add('class-order', f'the file has {used}')


def check_classes(split: Split, content: coco.Coco, evaluated: bool) -> None:
    """Check that each category is a class and has boxes that training or evaluation uses."""
    members: Dict[coco.Id, List[coco.Annotation]] = {key: [] for key in content.categories}
    for annotation in content.annotations:
        members.get(annotation.category_id, []).append(annotation)
    for key, boxes in members.items():
        name = content.categories[key]
        missed = sum(bool(box.ignore and not box.iscrowd) for box in boxes)
        if name not in split.classes:
            content.add('category-ignored', f'{name!r}, {len(boxes)} boxes')
        elif missed and evaluated:
            place = f'{name!r}, {missed} of {len(boxes)} boxes have `ignore`'
            content.add('box-ignored', place)
        elif boxes and all(box.iscrowd for box in boxes):
            content.add('crowd-only', f'{name!r}, all {len(boxes)} boxes')
        elif split.training and all(box.ignore for box in boxes):
            content.add('class-unseen', repr(name))


def check_evaluation(cfg: Config, content: coco.Coco) -> None:
    """Check what pycocotools needs and training does not."""
    for annotation in content.annotations:
        if annotation.iscrowd is None:
            content.add('annotation-incomplete', f'annotation {annotation.id} lacks iscrowd')
        if isinstance(annotation.id, str) or annotation.id == 0:
            content.add('annotation-id', f'id {annotation.id!r}', annotation)
    if not content.annotations:
        content.add('no-samples', 'no boxes')
    for part, ids in (('images', content.images), ('categories', content.categories)):
        texts = [value for value in ids if isinstance(value, str)]
        if 0 < len(texts) < len(ids):
            fact = f'{part}: {len(texts)} of {len(ids)} are text, as {texts[0]!r}'
            content.add('ids-mixed', fact)
    test_cfg = cfg.model.get('test_cfg') or {}
    most = (test_cfg.get('rcnn') or test_cfg).get('max_per_img')
    classes = content.split.classes
    found = [(i, name) for a, i, name in content.kept if name in classes and not a.iscrowd]
    per_class = Counter((image.id, image.file_name, name) for image, name in found)
    per_image = Counter((image.id, image.file_name, 'all classes') for image, _ in found)
    for counts, limit in ((per_class, COUNTED), (per_image, most)):
        for (_, file, name), count in counts.items():
            if isinstance(limit, int) and count > limit > 0:
                content.add('boxes-many', f'{file}: {count} boxes of {name}, {limit} are counted')


def check_boxes(content: coco.Coco) -> np.ndarray:
    """Check boxes against the sizes of their images and each other. Return which ones have a class and an area."""
    boxes = np.array([coco.box_of(annotation) for annotation, _, _ in content.kept]).reshape(-1, 4)
    shapes = np.array([(image.width, image.height) for _, image, _ in content.kept], float)
    area = np.array([annotation.area for annotation, _, _ in content.kept])
    # mmdet reads four numbers of every box, and leaves out those of other categories later.
    known = np.array([name in content.split.classes for *_, name in content.kept], bool)
    x, y, width, height = boxes.T
    columns, rows = shapes.reshape(-1, 2).T
    right, bottom = x + width, y + height
    finite = np.isfinite(boxes).all(1)
    sound = known & finite & (width > 0) & (height > 0) & (area > 0)
    outside = sound & ((right <= 0) | (bottom <= 0) | (x >= columns) | (y >= rows))
    beyond = (x < -1) | (y < -1) | (right > columns + 1) | (bottom > rows + 1)
    wrong = sound & (outside | beyond)
    # As corners, all are valid. As [x, y, width, height], too many leave their images.
    corners = (x < width) & (width <= columns + 1) & (y < height) & (height <= rows + 1)
    found = {'box-invalid': ~finite, 'box-empty': known & finite & ~sound}
    if (boxes[sound] <= 1).all():
        found['box-relative'] = sound
    elif corners[sound].all() and wrong.sum() > sound.sum() / 10:
        found['box-corners'] = wrong
    else:
        found['box-outside'], found['box-sticks-out'] = outside, wrong & ~outside
        found['box-small'] = sound & ~wrong & (np.minimum(width, height) < 1)
    for check, chosen in found.items():
        for annotation, image, _ in itertools.compress(content.kept, chosen):
            facts = f'area {annotation.area:g}, image {size((image.height, image.width))}'
            content.add(check, f'{reprlib.repr(annotation.bbox)}, {facts}', annotation)
    first: Dict[tuple, coco.Annotation] = {}
    pairs = zip(content.kept, boxes.tolist())
    for (annotation, _, _), box in itertools.compress(pairs, known):
        key = (annotation.image_id, annotation.category_id, *box)
        other = first.setdefault(key, annotation)
        if other is not annotation:
            fact = f'{annotation.bbox}, as annotation {other.id}'
            content.add('box-duplicate', fact, annotation)
    return sound


def check_masks(split: Split, content: coco.Coco, sound: np.ndarray) -> None:
    """Check the segmentations of the annotations that a mask selects."""
    polygons_only = not split.step('LoadAnnotations').get('poly2mask', True)
    for annotation, image, _ in itertools.compress(content.kept, sound):
        if not annotation.segmentation:
            content.add('mask-missing', 'no segmentation', annotation)
            continue
        problem = coco.mask_problem(annotation, image)
        if polygons_only and not isinstance(annotation.segmentation, list):
            problem = 'RLE, which LoadAnnotations.poly2mask=False does not read'
        if problem is not None and not (polygons_only and annotation.iscrowd):
            content.add('mask-invalid', problem, annotation)


def check_left(split: Split, content: coco.Coco) -> None:
    """Count the images that remain for training or evaluation."""
    filters = {} if split.dataset.test_mode else split.dataset.filter_cfg or {}
    min_size, classes = filters.get('min_size', 0), split.classes
    if not isinstance(min_size, (int, float)):
        split.add('dataset-unbuildable', f'filter_cfg.min_size = {min_size!r} is no number')
        min_size = 0
    annotated = {image.id for _, image, name in content.kept if name in classes}
    split.used = []
    for key, image in content.images.items():
        too_small = min(image.width, image.height) < min_size
        if too_small:
            shape = size((image.height, image.width))
            content.add('picture-filtered', f'{image.file_name}: {shape}, min_size {min_size}')
        if key not in annotated:
            content.add('boxes-none', image.file_name)
        if not too_small and (key in annotated or not filters.get('filter_empty_gt')):
            split.used.append(key)

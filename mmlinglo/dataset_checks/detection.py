# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Boxes in COCO format.

mmdet leaves out silently what it cannot use: boxes of categories that are not
among the classes, and boxes without width, height or area or outside their
picture. Its labels count the categories that are among the classes in the
order of the file (``get_cat_ids`` of its COCO API), whatever the order of the
classes.
"""

import difflib
import json
import math
import os.path as osp
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

from mmengine.config import Config

from .pictures import Opener, Picture, check_pictures, loading, size
from .report import Report
from .splits import Split, first_line

NEEDED = dict(
    images=('id', 'file_name', 'width', 'height'),
    annotations=('id', 'image_id', 'category_id', 'bbox', 'area'),
    categories=('id', 'name'),
)


def check(cfg: Config, splits: List[Split], report: Report, opener: Opener) -> None:  # noqa: ARG001
    """Check data sets of mmdet.

    Args:
        cfg: The experiment.
        splits: Its data sets.
        report: Findings go here.
        opener: Opens pictures.
    """
    from mmdet.datasets import CocoDataset

    categories: Dict[str, List[str]] = {}
    for split in splits:
        if not isinstance(split.dataset, CocoDataset):
            check_others(split, report, opener)
            continue
        check_evaluators(split, report)
        content = read_annotations(split, report)
        if content is None:
            continue
        names = check_categories(split, content, report)
        for other, theirs in categories.items():
            if theirs != names and set(theirs) == set(names):
                report.add(
                    'categories-differ', split.name, f'{other}: {theirs}, {split.name}: {names}'
                )
        categories[split.name] = names
        images = check_images(split, content, report)
        check_annotations(split, content, images, report)
        prefix = split.dataset.data_prefix['img']
        if not osp.isdir(prefix):
            report.add('folder-missing', split.name, prefix)
            continue
        decoding = loading(split)
        pictures = {
            osp.join(prefix, image['file_name']): (image['height'], image['width'])
            for image in images.values()
        }
        check_pictures(
            split,
            [Picture(path, shape, **decoding) for path, shape in pictures.items()],
            report,
            opener,
        )


def check_others(split: Split, report: Report, opener: Opener) -> None:
    """Pictures of a data set whose annotations are in another format."""
    report.add('dataset-unknown', split.name, type(split.dataset).__name__)
    try:
        samples = split.dataset.load_data_list()
    except Exception as error:  # whatever it raises for missing or broken files
        report.add('dataset-unbuildable', split.name, first_line(error))
        return
    split.num_samples = len(samples)
    paths = [sample['img_path'] for sample in samples if 'img_path' in sample]
    check_pictures(split, [Picture(path, **loading(split)) for path in paths], report, opener)


def check_evaluators(split: Split, report: Report) -> None:
    """The metric reads the annotations of the data set that is evaluated."""
    for name, evaluator in split.evaluators:
        path = evaluator.get('ann_file')
        if path is not None and osp.realpath(path) != osp.realpath(split.dataset.ann_file):
            place = f'{name}.ann_file = {path!r}, the data set reads {split.dataset.ann_file!r}'
            report.add('evaluator-file', split.name, place)


def read_annotations(split: Split, report: Report) -> Optional[Dict[str, List[dict]]]:
    """The annotation file, without entries that lack needed keys; None if it cannot be read."""
    path = split.dataset.ann_file
    if not osp.isfile(path):
        report.add('annotations-missing', split.name, path)
        return None
    try:
        content = json.loads(Path(path).read_bytes())
    except ValueError as error:
        report.add('annotations-unreadable', split.name, f'{path}: {first_line(error)}')
        return None
    lacking = [
        key
        for key in NEEDED
        if not (isinstance(content, dict) and isinstance(content.get(key), list))
    ]
    if lacking:
        place = f'{path}: no list {" and no list ".join(repr(key) for key in lacking)}'
        report.add('annotations-unreadable', split.name, place)
        return None
    complete = {}
    for part, keys in NEEDED.items():
        complete[part] = []
        for i, entry in enumerate(content[part]):
            missing = [key for key in keys if key not in entry]
            if missing:
                place = f'{path}: {part}[{i}] lacks {", ".join(missing)}'
                report.add('annotation-incomplete', split.name, place)
            else:
                complete[part].append(entry)
    # Read in evaluations only, where pycocotools raises KeyError.
    if not split.training:
        for entry in complete['annotations']:
            if 'iscrowd' not in entry:
                place = f'{path}: annotation {entry["id"]} lacks iscrowd'
                report.add('annotation-incomplete', split.name, place)
    return complete


def check_categories(split: Split, content: dict, report: Report) -> List[str]:
    """Categories against the classes of the config.

    Returns:
        Names of the categories in the order of the file, each once.
    """
    path, classes = split.dataset.ann_file, list(split.classes or [])
    names = [category['name'] for category in content['categories']]
    for key in ('id', 'name'):
        for value in _repeated(category[key] for category in content['categories']):
            report.add('category-duplicate', split.name, f'{path}: {key} {value!r}')
    lowered = {str(name).strip().lower(): name for name in names}
    for name in classes:
        if name not in names:
            close = difflib.get_close_matches(str(name).strip().lower(), lowered, n=1)
            hint = f' (did you mean {lowered[close[0]]!r}?)' if close else ''
            report.add('class-missing', split.name, f'{path}: no category {name!r}{hint}')
    counts = Counter(annotation['category_id'] for annotation in content['annotations'])
    for category in content['categories']:
        if category['name'] not in classes:
            place = f'{path}: {category["name"]!r}, {counts[category["id"]]} boxes'
            report.add('category-ignored', split.name, place)
        elif split.training and not counts[category['id']]:
            report.add('class-unseen', split.name, f'{path}: {category["name"]!r}')
    names = list(dict.fromkeys(names))
    used = [name for name in names if name in classes]
    if used != [name for name in classes if name in names]:
        report.add('class-order', split.name, f'{path}: the file has {used}')
    return names


def check_images(split: Split, content: dict, report: Report) -> Dict[Any, dict]:
    """Entries of `images` by their id."""
    path = split.dataset.ann_file
    for value in _repeated(image['id'] for image in content['images']):
        report.add('image-duplicate', split.name, f'{path}: id {value!r}')
    for value in _repeated(image['file_name'] for image in content['images']):
        report.add('file-duplicate', split.name, f'{path}: {value}')
    if not content['images']:
        report.add('pictures-none', split.name, f'{path}: `images` is empty')
    return {image['id']: image for image in content['images']}


def check_annotations(split: Split, content: dict, images: Dict[Any, dict], report: Report) -> None:
    """Boxes, and the pictures that are left to train or evaluate on."""
    path, name = split.dataset.ann_file, split.name
    categories = {category['id']: category['name'] for category in content['categories']}
    with_masks = split.step('LoadAnnotations').get('with_mask', False)
    for value in _repeated(annotation['id'] for annotation in content['annotations']):
        report.add('annotation-duplicate', name, f'{path}: id {value!r}')
    boxes: List[Tuple[str, Sequence[float], dict]] = []
    annotated = set()
    for annotation in content['annotations']:
        place = f'{path}: annotation {annotation["id"]}'
        image = images.get(annotation['image_id'])
        if annotation['category_id'] not in categories:
            place = f'{place}: category_id {annotation["category_id"]!r}'
            report.add('annotation-category', name, place)
            continue
        if image is None:
            report.add('annotation-image', name, f'{place}: image_id {annotation["image_id"]!r}')
            continue
        if categories[annotation['category_id']] in (split.classes or ()):
            annotated.add(annotation['image_id'])
        place = f'{place}, {image["file_name"]}'
        box = annotation['bbox']
        if not _is_box(box):
            report.add('box-invalid', name, f'{place}: {box!r}')
            continue
        if min(box[2:]) <= 0 or annotation['area'] <= 0:
            report.add('box-empty', name, f'{place}: {box}, area {annotation["area"]}')
            continue
        if with_masks and not annotation.get('segmentation'):
            report.add('mask-missing', name, place)
        boxes.append((f'{place}: {box}', box, image))
    check_boxes(split, boxes, report)
    _check_left(split, images, annotated, report)
    report.datasets[name].update(
        boxes=len(content['annotations']), classes=len(split.classes or ())
    )


def check_boxes(
    split: Split, boxes: List[Tuple[str, Sequence[float], dict]], report: Report
) -> None:
    """Boxes against the sizes of their pictures.

    Args:
        split: Data set of the boxes.
        boxes: Place for the report, [x, y, width, height] in pixels, and the
            entry of `images`.
        report: Findings go here.
    """
    if not boxes:
        return
    if all(max(box) <= 1 for _, box, _ in boxes):
        for place, _, _ in boxes:
            report.add('box-relative', split.name, place)
        return
    outside, sticking, small, corners = [], [], [], 0
    for place, (x, y, width, height), image in boxes:
        place = f'{place}, picture {size((image["height"], image["width"]))}'
        right, bottom = x + width, y + height
        if min(right, bottom) <= 0 or x >= image['width'] or y >= image['height']:
            outside.append(place)
        elif min(x, y) < -1 or right > image['width'] + 1 or bottom > image['height'] + 1:
            sticking.append(place)
        elif min(width, height) < 1:
            small.append(place)
        corners += x < width <= image['width'] + 1 and y < height <= image['height'] + 1
    # As corners, all are valid; as [x, y, width, height], too many leave their pictures.
    if corners == len(boxes) and len(outside) + len(sticking) > len(boxes) / 10:
        for place in (*outside, *sticking):
            report.add('box-corners', split.name, place)
        return
    for key, places in (
        ('box-outside', outside),
        ('box-sticks-out', sticking),
        ('box-small', small),
    ):
        for place in places:
            report.add(key, split.name, place)


def _check_left(split: Split, images: Dict[Any, dict], annotated: set, report: Report) -> None:
    dataset = split.dataset
    filters = {} if dataset.test_mode else dataset.filter_cfg or {}
    min_size = filters.get('min_size', 0)
    left = 0
    for key, image in images.items():
        too_small = min(image['width'], image['height']) < min_size
        place = f'{dataset.ann_file}: {image["file_name"]}'
        if too_small:
            shape = size((image['height'], image['width']))
            report.add('picture-filtered', split.name, f'{place}: {shape}, min_size {min_size}')
        if key not in annotated:
            report.add('boxes-none', split.name, place)
        left += not too_small and (key in annotated or not filters.get('filter_empty_gt', False))
    split.num_samples = left


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in box)
    )


def _repeated(values: Iterable[Any]) -> List[Any]:
    return [value for value, count in Counter(values).items() if count > 1]

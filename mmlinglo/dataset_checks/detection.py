# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Check boxes and masks in COCO format.

mmdet silently leaves out boxes that it cannot use: boxes of categories that are not among the
classes, boxes without width, height or area, and boxes outside their image. The COCO evaluation
reads the file itself and counts the latter as missed. mmdet numbers its labels in the order of
the categories in the file (``get_cat_ids`` of its COCO API), not in the order of the classes.
"""

import difflib
import os.path as osp
import reprlib
from collections import Counter
from typing import Any, Dict, Iterable, List

import numpy as np
from mmengine.config import Config

from . import coco
from .pictures import Opener, Picture, check_pictures, loading, size
from .splits import Split, type_name

COUNTED = 100  # boxes per image and class in the COCO evaluation's mAP


def check(cfg: Config, splits: List[Split], opener: Opener) -> None:
    """Check data sets of mmdet."""
    from mmdet.datasets import CocoDataset, CocoPanopticDataset

    names: Dict[str, List[str]] = {}
    for split in splits:
        dataset = split.dataset
        if isinstance(dataset, CocoDataset) and not isinstance(dataset, CocoPanopticDataset):
            check_coco(cfg, split, names, opener)
            continue
        split.add('dataset-unknown', type(dataset).__name__)
        samples = split.load('dataset-unbuildable') or []
        paths = [sample['img_path'] for sample in samples if 'img_path' in sample]
        check_pictures(split, [Picture(path, **loading(split)) for path in paths], opener)


def check_coco(cfg: Config, split: Split, names: Dict[str, List[str]], opener: Opener) -> None:
    """Check a data set in COCO format. ``names`` holds the categories of the earlier data sets."""
    path, evaluators = split.dataset.ann_file, split.evaluators
    for name, evaluator in evaluators:
        other = evaluator.get('ann_file')
        if other is not None and osp.realpath(other) != osp.realpath(path):
            split.add('evaluator-file', f'{name}.ann_file = {other!r}, the data set reads {path!r}')
    if not osp.isfile(path):
        split.add('annotations-missing', path)
        return
    unlabelled = bool(evaluators) and all(item.get('format_only') for _, item in evaluators)
    try:
        content, problems = coco.read(path, ('annotations',) if unlabelled else ())
    except coco.UnreadableError as error:
        split.add('annotations-unreadable', str(error))
        return
    for key, place in problems:
        split.add(key, place)
    theirs = check_categories(split, content)
    for other, categories in names.items():
        if theirs != categories and set(theirs) == set(categories):
            split.add('categories-differ', f'{other}: {categories}, {split.name}: {theirs}')
    names[split.name] = theirs
    images = check_images(split, content)
    split.num_samples = len(images)
    if content.annotations or not unlabelled:
        Annotations(cfg, split, content, images).check()
    prefix = split.prefix('img')
    if prefix is not None and not osp.isdir(prefix):
        split.add('folder-missing', prefix)
    elif prefix is not None:
        sizes = {osp.join(prefix, i.file_name): (i.height, i.width) for i in images.values()}
        pictures = [Picture(path, shape, **loading(split)) for path, shape in sizes.items()]
        check_pictures(split, pictures, opener)
        if split.training and pictures:
            split.input_size = split.transformed_size(
                dict(img_path=pictures[0].path, img_id=0, instances=[])
            )


def check_categories(split: Split, content: coco.Coco) -> List[str]:
    """Compare the categories with the classes of the config.

    Returns:
        Names of the categories in the order of the file, each once.
    """
    path, classes = split.dataset.ann_file, list(split.classes or [])
    names = [category.name for category in content.categories]
    for key in ('id', 'name'):
        for value in _repeated(getattr(category, key) for category in content.categories):
            split.add('category-duplicate', f'{path}: {key} {value!r}')
    lowered = {name.strip().lower(): name for name in names}
    for name in classes:
        if name not in names:
            close = difflib.get_close_matches(str(name).strip().lower(), lowered, n=1)
            hint = f' (did you mean {lowered[close[0]]!r}?)' if close else ''
            split.add('class-missing', f'{path}: no category {name!r}{hint}')
    counts = Counter(annotation.category_id for annotation in content.annotations)
    for category in content.categories:
        if category.name not in classes:
            place = f'{path}: {category.name!r}, {counts[category.id]} boxes'
            split.add('category-ignored', place)
    names = list(dict.fromkeys(names))
    used = [name for name in names if name in classes]
    if used != [name for name in classes if name in names]:
        split.add('class-order', f'{path}: the file has {used}')
    return names


def check_images(split: Split, content: coco.Coco) -> Dict[coco.Id, coco.Image]:
    """Check the entries of `images`, and return them by their id."""
    path = split.dataset.ann_file
    for value in _repeated(image.id for image in content.images):
        split.add('image-duplicate', f'{path}: id {value!r}')
    for value in _repeated(image.file_name for image in content.images):
        split.add('file-duplicate', f'{path}: {value}')
    if not content.images:
        split.add('pictures-none', f'{path}: `images` is empty')
    return {image.id: image for image in content.images}


class Annotations:
    """Checks the annotations of a file against each other, its categories and its images.

    Args:
        cfg: The experiment.
        split: Data set of the annotations.
        content: The file.
        images: Its images by id.
    """

    def __init__(
        self, cfg: Config, split: Split, content: coco.Coco, images: Dict[coco.Id, coco.Image]
    ) -> None:
        self.cfg, self.split, self.content, self.images = cfg, split, content, images
        self.path = split.dataset.ann_file
        metrics = [
            metric
            for _, metric in split.evaluators
            if type_name(metric['type']) == 'CocoMetric' and not metric.get('format_only')
        ]
        # Without ann_file, the metric writes its own file.
        self.evaluated = any(metric.get('ann_file') for metric in metrics)
        self.with_masks = split.step('LoadAnnotations').get('with_mask', False) or any(
            'segm' in metric.get('metric', 'bbox') for metric in metrics
        )
        self.names = {category.id: category.name for category in content.categories}
        # Annotations whose image and category are in the file, and their boxes.
        self.kept: List[coco.Annotation] = []
        self.boxes = np.empty((0, 4))

    def add(self, check: str, annotation: coco.Annotation, fact: str = '') -> None:
        """Report a defect of an annotation."""
        image = self.images.get(annotation.image_id)
        place = f'{self.path}: annotation {annotation.id}' + (
            f', {image.file_name}' if image else ''
        )
        self.split.add(check, place + (f': {fact}' if fact else ''))

    def check(self) -> None:
        """Report what is wrong with the annotations."""
        annotations = self.content.annotations
        for value in _repeated(annotation.id for annotation in annotations):
            self.split.add('annotation-duplicate', f'{self.path}: id {value!r}')
        for annotation in annotations:
            category_id, image_id = annotation.category_id, annotation.image_id
            if category_id not in self.content.ids['categories']:
                self.add('annotation-category', annotation, f'category_id {category_id!r}')
            elif image_id not in self.content.ids['images']:
                self.add('annotation-image', annotation, f'image_id {image_id!r}')
            elif category_id in self.names and image_id in self.images:
                self.kept.append(annotation)
        self.boxes = np.array([coco.box_of(a) for a in self.kept], float).reshape(-1, 4)
        self.check_classes()
        if self.evaluated:
            self.check_evaluation()
        self.check_boxes()
        self.check_left()
        self.split.count(boxes=len(annotations))

    def check_classes(self) -> None:
        """Check that each class has boxes that training or evaluation uses."""
        split, annotations = self.split, self.content.annotations
        total = Counter(a.category_id for a in annotations)
        crowd = Counter(a.category_id for a in annotations if a.iscrowd)
        ignored = Counter(a.category_id for a in annotations if a.ignore)
        missed = Counter(a.category_id for a in annotations if a.ignore and not a.iscrowd)
        for key, name in self.names.items():
            if name not in (split.classes or ()):
                continue
            place = f'{self.path}: {name!r}'
            if missed[key] and self.evaluated:
                place += f', {missed[key]} of {total[key]} boxes have `ignore`'
                split.add('box-ignored', place)
            elif crowd[key] and crowd[key] == total[key]:
                split.add('crowd-only', f'{place}, all {total[key]} boxes')
            elif split.training and ignored[key] == total[key]:
                split.add('class-unseen', place)

    def check_evaluation(self) -> None:
        """Check what pycocotools needs and training does not."""
        for annotation in self.content.annotations:
            if annotation.iscrowd is None:
                place = f'{self.path}: annotation {annotation.id} lacks iscrowd'
                self.split.add('annotation-incomplete', place)
            if isinstance(annotation.id, str) or annotation.id == 0:
                self.add('annotation-id', annotation, f'id {annotation.id!r}')
        if not self.content.annotations:
            self.split.add('no-samples', f'{self.path}: no boxes')
        for part in ('images', 'categories'):
            ids = [entry.id for entry in getattr(self.content, part)]
            texts = [value for value in ids if isinstance(value, str)]
            if 0 < len(texts) < len(ids):
                place = f'{self.path}: {part}: {len(texts)} of {len(ids)} are text, as {texts[0]!r}'
                self.split.add('ids-mixed', place)
        test_cfg = self.cfg.model.get('test_cfg') or {}
        most = (test_cfg.get('rcnn') or test_cfg).get('max_per_img')
        found = [annotation for annotation in self.kept if not annotation.iscrowd]
        per_class = Counter((a.image_id, self.names[a.category_id]) for a in found)
        per_image = Counter((a.image_id, 'all classes') for a in found)
        for counts, limit in ((per_class, COUNTED), (per_image, most)):
            for (image_id, name), count in counts.items():
                if isinstance(limit, int) and count > limit > 0:
                    place = f'{self.path}: {self.images[image_id].file_name}'
                    place += f': {count} boxes of {name}, {limit} are counted'
                    self.split.add('boxes-many', place)

    def check_boxes(self) -> None:
        """Check boxes against the sizes of their images, and masks."""
        shapes = [
            (self.images[a.image_id].width, self.images[a.image_id].height) for a in self.kept
        ]
        columns, rows = np.array(shapes, float).reshape(-1, 2).T
        x, y, width, height = self.boxes.T
        right, bottom = x + width, y + height
        area = np.array([annotation.area for annotation in self.kept])
        finite = np.all(np.isfinite(self.boxes), axis=1)
        sound = finite & (width > 0) & (height > 0) & (area > 0)
        self.add_boxes('box-invalid', ~finite)
        self.add_boxes('box-empty', finite & ~sound)
        if self.with_masks:
            self.check_masks(sound)
        if (self.boxes[sound] <= 1).all():
            self.add_boxes('box-relative', sound)
            return
        outside = sound & ((right <= 0) | (bottom <= 0) | (x >= columns) | (y >= rows))
        beyond = (x < -1) | (y < -1) | (right > columns + 1) | (bottom > rows + 1)
        wrong = sound & (outside | beyond)
        # As corners, all are valid. As [x, y, width, height], too many leave their images.
        corners = (x < width) & (width <= columns + 1) & (y < height) & (height <= rows + 1)
        if corners[sound].all() and wrong.sum() > sound.sum() / 10:
            self.add_boxes('box-corners', wrong)
            return
        self.add_boxes('box-outside', outside)
        self.add_boxes('box-sticks-out', wrong & ~outside)
        self.add_boxes('box-small', sound & ~wrong & (np.minimum(width, height) < 1))
        first: Dict[tuple, Any] = {}
        for annotation, box in zip(self.kept, self.boxes.tolist()):
            key = (annotation.image_id, annotation.category_id, *box)
            other = first.setdefault(key, annotation)
            if other is not annotation:
                self.add(
                    'box-duplicate', annotation, f'{annotation.bbox}, as annotation {other.id}'
                )

    def add_boxes(self, check: str, chosen: np.ndarray) -> None:
        """Report the boxes that a mask selects."""
        for i in np.flatnonzero(chosen):
            annotation = self.kept[i]
            image = self.images[annotation.image_id]
            facts = f'area {annotation.area:g}, image {size((image.height, image.width))}'
            self.add(check, annotation, f'{reprlib.repr(annotation.bbox)}, {facts}')

    def check_masks(self, chosen: np.ndarray) -> None:
        """Check the segmentations of the annotations that a mask selects."""
        polygons_only = not self.split.step('LoadAnnotations').get('poly2mask', True)
        for i in np.flatnonzero(chosen):
            annotation = self.kept[i]
            if self.names[annotation.category_id] not in (self.split.classes or ()):
                continue
            image, problem = self.images[annotation.image_id], None
            if not annotation.segmentation:
                self.add('mask-missing', annotation)
            elif polygons_only and not isinstance(annotation.segmentation, list):
                problem = 'RLE, which LoadAnnotations.poly2mask=False does not read'
            else:
                problem = coco.mask_problem(annotation, image, tuple(self.boxes[i]))
            if problem is not None and not (polygons_only and annotation.iscrowd):
                self.add('mask-invalid', annotation, problem)

    def check_left(self) -> None:
        """Count the images that remain for training or evaluation."""
        split, dataset = self.split, self.split.dataset
        filters = {} if dataset.test_mode else dataset.filter_cfg or {}
        min_size, classes = filters.get('min_size', 0), split.classes or ()
        if not isinstance(min_size, (int, float)):
            split.add('dataset-unbuildable', f'filter_cfg.min_size = {min_size!r} is no number')
            min_size = 0
        annotated = {a.image_id for a in self.kept if self.names[a.category_id] in classes}
        split.num_samples = 0
        for key, image in self.images.items():
            too_small = min(image.width, image.height) < min_size
            place = f'{self.path}: {image.file_name}'
            if too_small:
                shape = size((image.height, image.width))
                split.add('picture-filtered', f'{place}: {shape}, min_size {min_size}')
            if key not in annotated:
                split.add('boxes-none', place)
            if not too_small and (key in annotated or not filters.get('filter_empty_gt')):
                split.num_samples += 1


def _repeated(values: Iterable[Any]) -> List[Any]:
    return [value for value, count in Counter(values).items() if count > 1]

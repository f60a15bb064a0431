# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Small clean data sets of each task, in which tests plant defects."""

import json
import re

import cv2
import numpy as np
import pytest
from conftest import ROOT
from mmengine.config import Config

from mmlinglo.dataset_checks import check_datasets

TEMPLATES = dict(
    detection='retinanet_linglo-b0_fpn_1xb8-50e_custom',
    segmentation='fpn_linglo-b0_1xb8-8k_custom-512x512',
    classification='linglo-b0_1xb64-100e_custom',
)
CLASSES = dict(
    detection=('cat', 'dog'), segmentation=('sky', 'cat', 'dog'), classification=('cat', 'dog')
)
VARIABLES = dict(classification=dict(batch_size=2))  # few pictures, and drop_last
H, W = 32, 48


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (H, W, 3), dtype=np.uint8)


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def make_detection(root):
    """3 and 2 pictures, in each a box of each class."""
    for split, count in (('train', 3), ('val', 2)):
        write_coco(root, split, count)


def write_coco(root, split, count):
    """Pictures with a box of each class, and their annotation file."""
    images, annotations = [], []
    for i in range(1, count + 1):
        write(root / split / f'{i}.jpg', picture(i))
        images.append(dict(id=i, file_name=f'{i}.jpg', width=W, height=H))
        for category in (1, 2):
            place = dict(image_id=i, category_id=category, bbox=[20 + category, 3, 10, 12])
            annotations.append(dict(id=len(annotations) + 1, **place, area=120, iscrowd=0))
    categories = [dict(id=1, name='cat'), dict(id=2, name='dog')]
    path = root / 'annotations' / f'{split}.json'
    path.parent.mkdir(exist_ok=True)
    content = dict(images=images, annotations=annotations, categories=categories)
    path.write_text(json.dumps(content))


def make_segmentation(root):
    """3 and 2 pictures, the labels 0, 1, 2 in all and 255 in some."""
    for split, count in (('training', 3), ('validation', 2)):
        for i in range(count):
            labels = np.zeros((H, W), np.uint8)
            labels[:8], labels[8:16, :20], labels[-1, -1] = 1, 2, 255
            write(root / 'images' / split / f'{i}.jpg', picture(i))
            write(root / 'annotations' / split / f'{i}.png', labels)


def make_classification(root):
    for split, count in (('train', 3), ('val', 2)):
        for name in CLASSES['classification']:
            for i in range(count):
                write(root / split / name / f'{i}.jpg', picture(i))


MAKE = dict(
    detection=make_detection,
    segmentation=make_segmentation,
    classification=make_classification,
)


def copy_template(task, folder, **variables):
    """A copy of a template, as a user makes one, with other values of its variables."""
    text = (ROOT / f'configs/custom/{TEMPLATES[task]}.py').read_text()
    text = text.replace("_base_ = '..", f"_base_ = '{ROOT}/configs")
    for name, value in variables.items():
        text, count = re.subn(rf'^{name} = .*$', f'{name} = {value!r}', text, count=1, flags=re.M)
        assert count == 1, name
    path = folder / f'{task}.py'
    path.write_text(text)
    return path


class Experiment:
    """A clean data set of one task and the template's config for it."""

    def __init__(self, task, folder):
        self.task, self.root = task, folder / 'data'
        MAKE[task](self.root)
        variables = dict(data_root=str(self.root), classes=CLASSES[task])
        path = copy_template(task, folder, **variables, **VARIABLES.get(task, {}))
        self.cfg = Config.fromfile(path)
        self.annotations = self.root / 'annotations'

    def edit(self, change, split='train'):
        """Change the content of an annotation file."""
        path = self.annotations / f'{split}.json'
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    def relabel(self, table, splits=('training', 'validation')):
        """Replace numbers in the label images."""
        for split in splits:
            for path in (self.annotations / split).iterdir():
                old = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
                new = old.copy()
                for number, other in table.items():
                    new[old == number] = other
                write(path, new)

    def set_datasets(self, **settings):
        for split in ('train', 'val', 'test'):
            self.cfg[f'{split}_dataloader'].dataset.update(settings)

    def findings(self, **options):
        report = check_datasets(self.cfg, **options)
        return {finding.check: finding for finding in report.findings}


@pytest.fixture
def experiment(request, tmp_path):
    return Experiment(request.param, tmp_path)


def for_task(*tasks):
    return pytest.mark.parametrize('experiment', tasks, indirect=True)


for_all = pytest.mark.parametrize('experiment', list(TEMPLATES), indirect=True)

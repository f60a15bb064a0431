# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Defects planted in small clean data sets are found, each by its name, in the right file, and nothing else."""

import pytest
from dataset_experiment import H, W, for_task
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

pytest_plugins = ['dataset_experiment']


def swap_categories(content):
    content['categories'].reverse()


def renamed(content):
    content['categories'][0]['name'] = 'Cat'


def category_added(content):
    content['categories'].append(dict(id=3, name='bird'))


def same_category_id(content):
    content['categories'].append(dict(id=2, name='dog'))


def same_file(content):
    content['images'][1]['file_name'] = '1.jpg'


def annotation_set(key, value, index=0):
    def change(content):
        content['annotations'][index][key] = value

    return change


def annotation_without(key):
    def change(content):
        del content['annotations'][0][key]

    return change


def no_boxes(content):
    content['annotations'] = content['annotations'][2:]


def all_boxes(function):
    def change(content):
        for annotation in content['annotations']:
            annotation['bbox'] = function(*annotation['bbox'])

    return change


def without_class(content):
    content['annotations'] = [a for a in content['annotations'] if a['category_id'] != 2]


def picture_size(content):
    content['images'][0].update(width=H, height=W)


def missing_picture(content):
    content['images'][0]['file_name'] = 'nowhere.jpg'


def no_images(content):
    content.update(images=[], annotations=[])


BOX_DEFECTS = [
    ('class-missing', renamed, "'cat' (did you mean 'Cat'?)", {'category-ignored'}),
    ('class-order', swap_categories, "['dog', 'cat']", {'categories-differ'}),
    ('category-ignored', category_added, "'bird', 0 boxes", set()),
    ('category-duplicate', same_category_id, 'id 2', set()),
    ('file-duplicate', same_file, "train.json: file_name '1.jpg'", set()),
    ('annotation-duplicate', annotation_set('id', 2), 'id 2', set()),
    ('annotation-incomplete', annotation_without('area'), 'annotations[0] lacks area', set()),
    ('annotation-incomplete', annotation_without('bbox'), 'annotations[0] lacks bbox', set()),
    ('annotation-image', annotation_set('image_id', 99), 'annotation 1: image_id 99', set()),
    (
        'annotation-category',
        annotation_set('category_id', 9),
        'annotation 1, 1.jpg: category_id 9',
        set(),
    ),
    ('box-invalid', annotation_set('bbox', [1, 2, 3]), 'annotation 1, 1.jpg: [1, 2, 3]', set()),
    ('box-invalid', annotation_set('bbox', [1, 2, 3, float('nan')]), 'annotation 1, 1.jpg', set()),
    ('box-empty', annotation_set('bbox', [1, 2, 0, 5]), 'annotation 1, 1.jpg: [1, 2, 0, 5]', set()),
    ('box-empty', annotation_set('area', 0), 'annotation 1, 1.jpg', set()),
    ('box-outside', annotation_set('bbox', [W, 2, 5, 5]), f'annotation 1, 1.jpg: [{W}, 2', set()),
    ('box-outside', annotation_set('bbox', [-9, 2, 5, 5]), 'annotation 1, 1.jpg: [-9, 2', set()),
    ('box-sticks-out', annotation_set('bbox', [40, 2, 11, 5]), 'image 48 x 32', set()),
    ('box-small', annotation_set('bbox', [3, 2, 0.5, 5]), 'annotation 1, 1.jpg', set()),
    ('box-relative', all_boxes(lambda x, y, w, h: [x / W, y / H, w / W, h / H]), '1.jpg', set()),
    ('box-corners', all_boxes(lambda x, y, w, h: [x, y, x + w, y + h]), '1.jpg', set()),
    ('boxes-none', no_boxes, 'train.json: 1.jpg', set()),
    ('class-unseen', without_class, "'dog'", set()),
    ('picture-size', picture_size, '1.jpg: 48 x 32, annotated 32 x 48', set()),
    ('picture-missing', missing_picture, 'nowhere.jpg', set()),
    ('pictures-none', no_images, '`images` is empty', {'no-samples', 'class-unseen'}),
    ('annotations-unreadable', lambda c: c.pop('categories'), "no list 'categories'", set()),
]


@for_task('detection')
@pytest.mark.parametrize(
    ('check', 'change', 'place', 'others'), BOX_DEFECTS, ids=[d[0] for d in BOX_DEFECTS]
)
def test_defects_of_boxes(experiment, check, change, place, others):
    experiment.edit(change)
    found = experiment.findings()
    assert set(found) == {check} | others
    assert place in found[check].places[0]
    if check not in ('picture-size', 'picture-missing'):
        assert found[check].places[0].startswith(str(experiment.annotations / 'train.json'))
    datasets = {finding.dataset for finding in found.values()} - {'val, test'}
    assert datasets == {'train'}


@for_task('detection')
def test_pictures_that_cameras_mark_as_rotated(experiment):
    path = experiment.root / 'train/1.jpg'
    image, exif = Image.open(path), Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    image.save(path, exif=exif)
    found = experiment.findings()
    assert set(found) == {'picture-size'}
    assert found['picture-size'].places == [f'{path}: 32 x 48, annotated 48 x 32']


@for_task('detection')
def test_image_ids_are_unique(experiment):
    def change(content):
        content['images'][1]['id'] = 1
        for annotation in content['annotations']:
            annotation['image_id'] = 1 if annotation['image_id'] == 2 else annotation['image_id']

    experiment.edit(change)
    found = experiment.findings()
    assert set(found) == {'image-duplicate', 'box-duplicate'}
    assert found['image-duplicate'].places == [f'{experiment.annotations}/train.json: id 1']


@for_task('detection')
def test_boxes_of_other_categories_are_left_out(experiment):
    def change(content):
        boxes = [[1, 2, 0, 5], [W, 2, 5, 5], [40, 2, 11, 5], [3, 2, 0.5, 5], *101 * [[3, 2, 5, 5]]]
        fields = dict(image_id=1, category_id=2, area=9, iscrowd=0)
        content['annotations'] += [dict(fields, id=9 + i, bbox=box) for i, box in enumerate(boxes)]

    for split in ('train', 'val'):
        experiment.edit(change, split)
    checks = ('empty', 'outside', 'sticks-out', 'small', 'duplicate')
    assert set(experiment.findings()) == {*(f'box-{check}' for check in checks), 'boxes-many'}
    experiment.set_datasets(metainfo=dict(classes=('cat',)))
    experiment.cfg.model.bbox_head.num_classes = 1
    assert set(experiment.findings()) == {'category-ignored'}
    experiment.edit(annotation_set('bbox', [1, 2, 3], index=1))  # mmdet fails on it
    assert 'box-invalid' in experiment.findings()


@for_task('detection')
def test_what_only_evaluation_needs(experiment):
    experiment.edit(annotation_without('iscrowd'))
    assert experiment.findings() == {}
    experiment.edit(annotation_without('iscrowd'), 'val')
    found = experiment.findings()
    assert set(found) == {'annotation-incomplete'}
    assert found['annotation-incomplete'].places[0].endswith('val.json: annotation 1 lacks iscrowd')


@for_task('detection')
def test_broken_annotation_file(experiment):
    (experiment.annotations / 'val.json').write_text('{"images": [')
    found = experiment.findings()
    assert set(found) == {'annotations-unreadable'}
    assert str(experiment.annotations / 'val.json') in found['annotations-unreadable'].places[0]


@for_task('detection')
def test_evaluator_with_another_file(experiment):
    experiment.cfg.test_evaluator.ann_file = f'{experiment.annotations}/train.json'
    found = experiment.findings()
    assert set(found) == {'evaluator-file'}
    assert found['evaluator-file'].places[0].startswith('test_evaluator.ann_file = ')


@for_task('detection')
def test_pictures_below_the_least_size(experiment):
    experiment.cfg.train_dataloader.dataset.filter_cfg.min_size = H + 1
    found = experiment.findings()
    assert set(found) == {'picture-filtered', 'no-samples'}
    assert len(found['picture-filtered'].places) == 3
    assert '1.jpg: 48 x 32, min_size 33' in found['picture-filtered'].places[0]


@for_task('detection')
def test_masks_for_a_detector_with_masks(experiment):
    experiment.cfg.train_dataloader.dataset.pipeline[1].with_mask = True
    found = experiment.findings()
    assert set(found) == {'mask-missing'}
    assert 'annotation 1, 1.jpg' in found['mask-missing'].places[0]


@for_task('detection')
def test_classes_and_colours(experiment):
    experiment.set_datasets(metainfo=dict(classes='cat'))
    assert {'classes-text'} <= set(experiment.findings())
    experiment.set_datasets(metainfo=dict(classes=('cat', 'dog'), palette=[(0, 0, 0)]))
    assert set(experiment.findings()) == {'palette-short'}
    experiment.cfg.val_dataloader.dataset.metainfo = dict(classes=('dog', 'cat'))
    experiment.cfg.test_dataloader.dataset.metainfo = dict(classes=('dog', 'cat'))
    found = experiment.findings()
    assert {'classes-differ', 'class-order'} <= set(found)
    assert found['class-order'].dataset == 'val, test'


@for_task('detection')
def test_wrapped_and_joined_data_sets(experiment):
    leaf = experiment.cfg.train_dataloader.dataset
    broken = {**leaf, 'ann_file': 'annotations/broken.json'}
    experiment.cfg.train_dataloader.dataset = dict(
        type='RepeatDataset',
        times=2,
        dataset=dict(type='ConcatDataset', datasets=[leaf, broken]),
    )
    found = experiment.findings()
    assert set(found) == {'annotations-missing'}
    assert found['annotations-missing'].dataset == 'train 1'


def labels_of(cfg):
    """Class numbers that mmdet gives the boxes of the first picture."""
    init_default_scope('mmdet')
    dataset = DATASETS.build({**cfg.train_dataloader.dataset, 'pipeline': []})
    return [instance['bbox_label'] for instance in dataset.get_data_info(0)['instances']]


@for_task('detection')
def test_mmdet_does_what_the_findings_say(experiment):
    assert labels_of(experiment.cfg) == [0, 1]
    # class-order: labels follow the file, not the config
    experiment.cfg.train_dataloader.dataset.metainfo.classes = ('dog', 'cat')
    assert labels_of(experiment.cfg) == [0, 1]
    # class-missing: the labels after it shift
    experiment.cfg.train_dataloader.dataset.metainfo.classes = ('Cat', 'dog')
    assert labels_of(experiment.cfg) == [0]
    # box-outside, box-empty, box-small: left out
    experiment.cfg.train_dataloader.dataset.metainfo.classes = ('cat', 'dog')
    for box in ([W, 2, 5, 5], [1, 2, 0, 5], [3, 2, 0.5, 5]):
        experiment.edit(annotation_set('bbox', box))
        assert labels_of(experiment.cfg) == [1]

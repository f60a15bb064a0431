# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""COCO files against mmdet and pycocotools themselves.

The reference is the score of perfect predictions: what mmdet's data set reads from a file is
evaluated by mmdet's metric on the same file. A file without errors is loaded and gets 1.
"""

import copy
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_experiment import Experiment, H, W, for_task, write_coco
from mmengine.registry import DATASETS, METRICS, init_default_scope
from pycocotools import mask as mask_utils

from mmlinglo.dataset_checks import coco

pytest_plugins = ['dataset_experiment']


def perfect_score(cfg):
    """mAP of boxes that equal the truth, in the metric of a config's validation."""
    init_default_scope('mmdet')
    dataset = DATASETS.build({**cfg.val_dataloader.dataset, 'pipeline': []})
    metric = METRICS.build({**cfg.val_evaluator, 'metric': 'bbox'})
    metric.dataset_meta = dataset.metainfo
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        boxes = [instance['bbox'] for instance in info['instances']]
        labels = [instance['bbox_label'] for instance in info['instances']]
        predictions = dict(
            bboxes=torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4),
            labels=torch.tensor(labels, dtype=torch.long),
            scores=torch.ones(len(labels)),
        )
        shape = (info['height'], info['width'])
        sample = dict(pred_instances=predictions, img_id=info['img_id'], ori_shape=shape)
        metric.process({}, [dict(sample, instances=info['instances'])])
    return metric.evaluate(len(dataset))['coco/bbox_mAP']


def every(key, value, category=None):
    """Set a key in all annotations, or in those of one category."""

    def change(content):
        for annotation in content['annotations']:
            if category in (None, annotation['category_id']):
                annotation[key] = value(annotation) if callable(value) else value

    return change


def ids_of(part, value):
    """Change ids of pictures or categories, and where annotations name them."""

    def change(content):
        key = dict(images='image_id', categories='category_id')[part]
        for entry in content[part]:
            entry['id'] = value(entry['id'])
        for annotation in content['annotations']:
            annotation[key] = value(annotation[key])

    return change


def many_boxes(content):
    start = len(content['annotations']) + 1
    for i in range(150):
        box = [i % 40, i / 9, 2, 2]
        content['annotations'].append(
            dict(id=start + i, image_id=1, category_id=1, bbox=box, area=4, iscrowd=0)
        )


def text_in_one(part):
    return ids_of(part, lambda value: 'first' if value == 1 else value)


# Change of a file that is evaluated, score of perfect predictions (or the error that it ends
# in), the check that finds it and what the place must hold.
EVALUATIONS = {
    'nothing': (lambda _: None, 1.0, None, ''),
    'ids from 0': (every('id', lambda a: a['id'] - 1), 0.782, 'annotation-id', '1.jpg: id 0'),
    'text ids': (every('id', lambda a: f'a{a["id"]}'), ValueError, 'annotation-id', "id 'a1'"),
    'text ids of digits': (every('id', lambda a: str(a['id'])), 1.0, 'annotation-id', "id '1'"),
    'negative ids': (every('id', lambda a: -a['id']), 1.0, None, ''),
    'fractional ids': (every('id', lambda a: a['id'] + 0.5), 1.0, None, ''),
    'ids null': (every('id', None), AssertionError, 'value-invalid', '[0].id is None: expected'),
    'one id twice': (every('id', 1, 1), AssertionError, 'annotation-duplicate', 'id 1'),
    'all crowds': (every('iscrowd', 1), -1.0, 'crowd-only', "'cat', all 4 boxes"),
    'a class of crowds': (every('iscrowd', 1, 2), 1.0, 'crowd-only', "'dog', all 4 boxes"),
    'crowd as text': (every('iscrowd', '0'), -1.0, 'value-invalid', ".iscrowd is '0': expected"),
    'crowd null': (every('iscrowd', None), TypeError, 'annotation-incomplete', 'lacks iscrowd'),
    'crowd as bool': (every('iscrowd', False), 1.0, None, ''),
    'ignore': (every('ignore', 1, 1), 0.5, 'box-ignored', "'cat', 4 of 4 boxes"),
    'ignore 0': (every('ignore', 0), 1.0, None, ''),
    'ignore and crowd': (
        lambda c: c['annotations'][0].update(ignore=1, iscrowd=1),
        1.0,
        None,
        '',
    ),
    'ignore as text': (every('ignore', '0', 1), 0.5, 'value-invalid', ".ignore is '0': expected"),
    'area 0': (every('area', 0, 1), 0.5, 'box-empty', 'area 0'),
    'area null': (every('area', None), TypeError, 'value-invalid', '.area is None: expected float'),
    'area text': (every('area', '9'), TypeError, 'value-invalid', ".area is '9': expected float"),
    'area too large': (every('area', 1e11), -1.0, 'value-invalid', 'expected float <= 1'),
    'narrow boxes': (every('bbox', [3, 2, 0.5, 9], 1), 0.5, 'box-small', '[3, 2, 0.5, 9]'),
    'boxes outside': (every('bbox', [W, 2, 5, 5], 1), 0.5, 'box-outside', f'[{W}, 2, 5, 5]'),
    'too many boxes': (many_boxes, 0.832, 'boxes-many', '151 boxes of cat, 100 are counted'),
    'text ids of pictures': (ids_of('images', str), 1.0, None, ''),
    'mixed ids of pictures': (text_in_one('images'), TypeError, 'ids-mixed', 'images: 1 of 4'),
    'ids of pictures from 0': (ids_of('images', lambda i: i - 1), 1.0, None, ''),
    'text ids of categories': (ids_of('categories', str), 1.0, None, ''),
    'mixed ids of categories': (text_in_one('categories'), TypeError, 'ids-mixed', 'categories: 1'),
    'ids of categories from 0': (ids_of('categories', lambda i: i - 1), 1.0, None, ''),
    'width 48.0': (lambda c: c['images'][0].update(width=48.0), 1.0, None, ''),
    'width text': (lambda c: c['images'][0].update(width='48'), TypeError, 'value-invalid', "'48'"),
    'width null': (lambda c: c['images'][0].update(width=None), TypeError, 'value-invalid', 'None'),
    'width 0': (lambda c: c['images'][0].update(width=0), 0.752, 'value-invalid', 'width is 0'),
    'category list': (every('category_id', [1]), TypeError, 'value-invalid', 'category_id is [1]'),
    'file name null': (
        lambda c: c['images'][0].update(file_name=None),
        TypeError,
        'value-invalid',
        'images[0].file_name is None: expected str, got null',
    ),
    'an annotation is a number': (
        lambda c: c['annotations'].insert(2, 7),
        TypeError,
        'value-invalid',
        'annotations[2] is 7: expected object, got int',
    ),
}


@for_task('detection')
@pytest.mark.parametrize(
    ('change', 'score', 'check', 'place'), EVALUATIONS.values(), ids=EVALUATIONS.keys()
)
def test_what_changes_a_perfect_score(experiment, change, score, check, place):
    write_coco(experiment.root, 'val', 4)
    experiment.edit(change, 'val')
    if isinstance(score, type):
        with pytest.raises(score):
            perfect_score(experiment.cfg)
    else:
        assert perfect_score(experiment.cfg) == score
    found = experiment.findings()
    if check is None:
        assert found == {}
    else:
        assert check in found
        assert found[check].dataset == 'val, test'
        assert any(place in each for each in found[check].places)
        assert found[check].places[0].startswith(f'{experiment.annotations}/val.json: ')


@for_task('detection')
def test_ids_do_not_matter_to_a_metric_that_writes_its_own_file(experiment):
    experiment.edit(every('id', lambda a: a['id'] - 1), 'val')
    assert set(experiment.findings()) == {'annotation-id'}
    for name in ('val_evaluator', 'test_evaluator'):
        experiment.cfg[name].pop('ann_file')
    assert experiment.findings() == {}
    assert perfect_score(experiment.cfg) == 1


@for_task('detection')
def test_classes_of_which_training_sees_nothing(experiment):
    experiment.edit(every('iscrowd', 1, 2))
    found = experiment.findings()
    assert set(found) == {'crowd-only'}
    assert found['crowd-only'].places == [
        f"{experiment.annotations}/train.json: 'dog', all 3 boxes"
    ]
    experiment.edit(every('iscrowd', 0))
    experiment.edit(every('ignore', 1, 2))
    assert set(experiment.findings()) == {'class-unseen'}


@for_task('detection')
def test_the_model_keeps_fewer_boxes_than_a_picture_has(experiment):
    experiment.cfg.model.test_cfg.max_per_img = 1
    found = experiment.findings()
    assert set(found) == {'boxes-many'}
    assert found['boxes-many'].places[0].endswith('1.jpg: 2 boxes of all classes, 1 are counted')


@for_task('detection')
def test_two_annotations_of_one_object(experiment):
    def change(content):
        content['annotations'].append({**content['annotations'][0], 'id': 99})

    experiment.edit(change)
    found = experiment.findings()
    assert set(found) == {'box-duplicate'}
    place = 'annotation 99, 1.jpg: [21, 3, 10, 12], as annotation 1'
    assert found['box-duplicate'].places == [f'{experiment.annotations}/train.json: {place}']


@for_task('detection')
@pytest.mark.parametrize(
    ('encoding', 'problem', 'error'),
    [
        (
            'utf-8-sig',
            'starts with a byte-order mark: save it as UTF-8 without',
            json.JSONDecodeError,
        ),
        ('utf-16', 'is UTF-16 or UTF-32: save it as UTF-8', UnicodeDecodeError),
    ],
)
def test_files_are_read_as_the_training_reads_them(experiment, encoding, problem, error):
    path = experiment.annotations / 'train.json'
    path.write_text(path.read_text(), encoding=encoding)
    found = experiment.findings()
    assert set(found) == {'annotations-unreadable'}
    assert found['annotations-unreadable'].places == [f'{path}: the text {problem}'] or (
        found['annotations-unreadable'].places[0].startswith(f'{path}: the text {problem}')
    )
    with pytest.raises(error):
        DATASETS.build({**experiment.cfg.train_dataloader.dataset, 'pipeline': []})


@for_task('detection')
@pytest.mark.parametrize('encoding', ['utf-16-le', 'utf-16-be'])
def test_texts_without_a_mark_are_recognised(experiment, encoding):
    path = experiment.annotations / 'train.json'
    path.write_text(path.read_text(), encoding=encoding)
    place = f'{path}: the text is UTF-16 or UTF-32: save it as UTF-8'
    assert experiment.findings()['annotations-unreadable'].places == [place]


@for_task('detection')
@pytest.mark.parametrize(('part', 'key'), [('images', 'width'), ('categories', 'name')])
def test_entries_that_cannot_be_used_are_in_the_file_all_the_same(experiment, part, key):
    experiment.edit(lambda content: content[part][0].update({key: None}))
    found = experiment.findings()
    assert 'value-invalid' in found
    assert not {'annotation-image', 'annotation-category'} & set(found)


@for_task('detection')
def test_a_least_size_that_is_no_number(experiment):
    experiment.cfg.train_dataloader.dataset.filter_cfg.min_size = '32'
    found = experiment.findings()
    assert set(found) == {'dataset-unbuildable'}
    assert found['dataset-unbuildable'].places == ["filter_cfg.min_size = '32' is no number"]


@for_task('detection')
@pytest.mark.parametrize(
    ('text', 'place'),
    [
        ('7', 'not an object of lists, but 7'),
        ('{"images": {}, "annotations": [], "categories": 1}', "no list 'images' and no list 'cat"),
        ('[' * 100_000, 'recursion'),
        ('{"images": 1' + '0' * 5000 + '}', '4300 digits'),
    ],
    ids=['number', 'lists', 'nested', 'digits'],
)
def test_texts_that_are_no_annotation_file(experiment, text, place):
    (experiment.annotations / 'train.json').write_text(text)
    found = experiment.findings()
    assert set(found) == {'annotations-unreadable'}
    assert place in found['annotations-unreadable'].places[0]


@for_task('detection')
def test_test_data_without_annotations(experiment):
    """As COCO's test-dev, whose results are only written to be evaluated elsewhere."""
    experiment.cfg.test_dataloader = copy.deepcopy(experiment.cfg.val_dataloader)
    experiment.cfg.test_dataloader.dataset.ann_file = 'annotations/test.json'
    path = f'{experiment.annotations}/test.json'
    content = json.loads((experiment.annotations / 'val.json').read_text())
    del content['annotations']
    Path(path).write_text(json.dumps(content))
    experiment.cfg.test_evaluator = dict(experiment.cfg.test_evaluator, ann_file=path)
    found = experiment.findings()
    assert set(found) == {'annotations-unreadable'}
    assert found['annotations-unreadable'].dataset == 'test'
    experiment.cfg.test_evaluator.update(format_only=True, outfile_prefix='results')
    assert experiment.findings() == {}


@for_task('detection')
def test_nothing_to_evaluate(experiment):
    experiment.edit(lambda content: content.update(annotations=[]), 'val')
    found = experiment.findings()
    assert set(found) == {'no-samples', 'boxes-none'}
    assert found['no-samples'].places == [f'{experiment.annotations}/val.json: no boxes']


@for_task('detection')
@pytest.mark.parametrize('prefix', [dict(img_path='train'), dict()], ids=['other key', 'none'])
def test_data_prefix_of_another_key(experiment, prefix):
    experiment.cfg.train_dataloader.dataset.pop('data_prefix')
    experiment.cfg.train_dataloader.dataset.data_prefix = prefix
    with pytest.raises(KeyError):
        DATASETS.build({**experiment.cfg.train_dataloader.dataset, 'pipeline': []})
    found = experiment.findings()
    assert set(found) == {'data-prefix'}
    assert found['data-prefix'].places == [f"data_prefix = {prefix} has no 'img'"]


# ---- masks

SQUARE = [20, 3, 30, 3, 30, 15, 20, 15]


def run_lengths(shape=(H, W), compressed=True, row=3):
    """A mask of the box of the annotations of class 1, as pycocotools writes it."""
    mask = np.zeros(shape, np.uint8, order='F')
    mask[row : row + 12, 21:31] = 1
    if compressed:
        encoded = mask_utils.encode(mask)
        return {**encoded, 'counts': encoded['counts'].decode()}
    flat = mask.ravel(order='F')
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return dict(size=list(shape), counts=counts)


GOOD_MASKS = dict(
    polygon=[SQUARE],
    polygons=[SQUARE, [22, 4, 24, 4, 24, 6.5]],
    compressed=run_lengths(),
    counts=run_lengths(compressed=False),
    top=run_lengths(row=0),
)
BAD_MASKS = {
    'odd polygon': ([[*SQUARE, 7]], 'polygon 0 has 9 values'),
    'second polygon odd': ([SQUARE, [*SQUARE, 7]], 'polygon 1 has 9 values'),
    'line': ([[20, 3, 30, 3]], 'polygon 0 has 4 values'),
    'not nested': (SQUARE, 'segmentation[0] is 20: expected array, got int'),
    'empty polygon': ([[]], 'polygon 0 has 0 values'),
    'text': ('all of it', "is 'all of it': expected object | array, got str"),
    'true': (True, 'is True: expected object | array, got bool'),
    'text in a polygon': ([['20', *SQUARE[1:]]], "[0][0] is '20'"),
    'not finite': ([[math.nan, *SQUARE[1:]]], 'not finite'),
    'fractions of the picture': ([[x / W for x in SQUARE]], 'the polygons span [0.41'),
    'elsewhere': ([[x + 13 for x in SQUARE]], 'the polygons span [33, 16, 10, 12], apart from'),
    'RLE of another size': (
        run_lengths((H, W + 9)),
        f'size [{H}, {W + 9}], but the image has [{H}, {W}]',
    ),
    'RLE of width and height': (run_lengths((W, H)), f'RLE of size [{W}, {H}]'),
    'RLE without size': (dict(counts=[1]), 'object missing required field size'),
    'RLE of fractions': (dict(size=[32.0, 48], counts=[1]), '.size[0]'),
    'RLE without counts': (dict(size=[H, W]), 'object missing required field counts'),
    'counts null': (dict(size=[H, W], counts=None), '.counts is None: expected str | array'),
    'counts too few': (dict(size=[H, W], counts=[5, 7]), f'12 pixels, but the image has {H * W}'),
    'counts negative': (dict(size=[H, W], counts=[-5, H * W + 5]), '.counts[0]'),
    'nothing in it': (dict(size=[H, W], counts=[H * W]), 'without a pixel'),
    'damaged': ({**run_lengths(), 'counts': run_lengths()['counts'] + 'o'}, 'cannot be decoded'),
    'not compressed counts': (dict(size=[H, W], counts='5 7 9'), 'cannot be decoded'),
    'cut off': (
        {**run_lengths(), 'counts': run_lengths()['counts'][:-1]},
        'cannot be decoded',
    ),
}


@pytest.fixture
def mask_experiment(tmp_path):
    experiment = Experiment('detection', tmp_path)
    experiment.cfg.train_dataloader.dataset.pipeline[1].with_mask = True
    experiment.edit(every('segmentation', [SQUARE]))
    return experiment


@pytest.mark.parametrize('mask', GOOD_MASKS.values(), ids=GOOD_MASKS.keys())
def test_masks(mask_experiment, mask):
    mask_experiment.edit(every('segmentation', mask))
    assert mask_experiment.findings() == {}
    assert load_masks(mask_experiment.cfg)[0].any()


@pytest.mark.parametrize(('mask', 'problem'), BAD_MASKS.values(), ids=BAD_MASKS.keys())
def test_wrong_masks(mask_experiment, mask, problem):
    def change(content):
        content['annotations'][1]['segmentation'] = mask

    mask_experiment.edit(change)
    found = mask_experiment.findings()
    assert set(found) == {'mask-invalid'}
    start = f'{mask_experiment.annotations}/train.json: annotation 2, 1.jpg: '
    assert len(found['mask-invalid'].places) == 1
    assert found['mask-invalid'].places[0].startswith(start)
    assert problem in found['mask-invalid'].places[0]
    mask_experiment.cfg.train_dataloader.dataset.pipeline[1].with_mask = False
    assert mask_experiment.findings() == {}


def load_masks(cfg):
    """Masks of the first picture, as mmdet's pipeline loads them."""
    init_default_scope('mmdet')
    pipeline = cfg.train_dataloader.dataset.pipeline[:2]
    dataset = DATASETS.build({**cfg.train_dataloader.dataset, 'pipeline': pipeline})
    return dataset[0]['gt_masks'].masks


def test_masks_that_only_the_evaluation_reads(mask_experiment):
    assert mask_experiment.findings() == {}
    mask_experiment.cfg.val_evaluator.metric = ['bbox', 'segm']
    found = mask_experiment.findings()
    assert set(found) == {'mask-missing'}
    assert found['mask-missing'].dataset == 'val, test'


def test_run_lengths_where_only_polygons_are_read(mask_experiment):
    mask_experiment.cfg.train_dataloader.dataset.pipeline[1].poly2mask = False
    assert mask_experiment.findings() == {}
    mask_experiment.edit(every('segmentation', run_lengths()))
    found = mask_experiment.findings()
    assert set(found) == {'mask-invalid'}
    assert found['mask-invalid'].places[0].endswith('poly2mask=False does not read')


def test_compressed_counts_are_decoded_as_by_pycocotools():
    """All that it encodes, differences of either sign and numbers of several characters too."""
    rng = np.random.default_rng(0)
    for density in (0.01, 0.3, 0.9):
        for shape in ((7, 5), (40, 61), (300, 200)):
            mask = np.asfortranarray(rng.random(shape) < density, np.uint8)
            text = mask_utils.encode(mask)['counts'].decode()
            image = coco.Image(1, '', shape[1], shape[0])
            for counts, problem in ((text, None), (text[:-1], 'RLE')):
                segmentation = dict(size=shape, counts=counts)
                box = [0, 0, *shape[::-1]]
                annotation = coco.Annotation(1, 1, 1, box, 1.0, segmentation=segmentation)
                found = coco.mask_problem(annotation, image)
                assert found is None if problem is None else found.startswith(problem)


# ---- whatever the file holds

VALUES = (
    *(None, True, False, 0, 1, -1, 1.5, -0.5, 10**30, -(10**400), math.nan, math.inf, 1e308),
    *('', '1', 'cat', 'x' * 300, '\ud800', '1.jpg\0', '../1.jpg', [], {}, [[]], [1, 2, 3, 4]),
    *([None] * 4, {'id': 1}, [[[[]]]], {'size': [H, W], 'counts': 'o'}, {'counts': []}),
)


def places_of(node, path=()):
    """Paths of all values in nested lists and dicts."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places_of(value, (*path, key))


def spoil(content, rng):
    """Exchange, delete or add a value at a random place."""

    def parent_of(path):
        node = content
        for key in path[:-1]:
            node = node[key]
        return node

    places = list(places_of(content))
    path, other = rng.choice(places), rng.choice(places)
    parent, key = parent_of(path), path[-1]
    action = rng.choice(['set', 'set', 'copy', 'key', 'delete'])
    if action == 'set':
        parent[key] = copy.deepcopy(rng.choice(VALUES))
    elif action == 'copy':
        parent[key] = copy.deepcopy(parent_of(other)[other[-1]])
    elif action == 'key' and isinstance(parent, dict):
        parent[rng.choice(['ignore', 'iscrowd', 'segmentation', '\ud800'])] = rng.choice(VALUES)
    else:
        del parent[key]


@pytest.mark.parametrize(
    ('part', 'files'),
    [(0, 150), *(pytest.param(p, 500, marks=pytest.mark.slow) for p in (1, 2, 3, 4))],
)
def test_whatever_the_file_holds(tmp_path, part, files):
    """Spoilt files: no error of the checker, and perfect scores unless it finds something."""
    experiment = Experiment('detection', tmp_path)
    cfg = experiment.cfg
    cfg.train_dataloader.dataset.pipeline[1].with_mask = True
    cfg.val_dataloader.dataset.data_prefix = cfg.train_dataloader.dataset.data_prefix
    cfg.test_dataloader = cfg.test_evaluator = None
    cfg.val_evaluator.metric = ['bbox', 'segm']
    experiment.edit(
        every('segmentation', lambda a: GOOD_MASKS['polygon' if a['id'] % 2 else 'counts'])
    )
    valid = json.loads((experiment.annotations / 'train.json').read_text())
    rng, found, sound = random.Random(part), set(), 0
    for _ in range(files):
        content = copy.deepcopy(valid)
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            spoil(content, rng)
        text = json.dumps(content)
        for split in ('train', 'val'):
            (experiment.annotations / f'{split}.json').write_text(text)
        findings = experiment.findings(num=1)
        found |= set(findings)
        if {finding.severity for finding in findings.values()} <= {'warning'}:
            if not {'box-small', 'boxes-many'} & set(findings):
                sound += 1
                assert perfect_score(cfg) == 1, text
    assert {'value-invalid', 'annotation-incomplete', 'annotations-unreadable'} <= found
    assert {'box-invalid', 'mask-invalid', 'annotation-image', 'annotation-category'} <= found
    assert sound > files / 50

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Defects planted in small clean data sets are found, each by its name, in the right file, and nothing else."""

import json
import re
import shutil

import cv2
import numpy as np
import pytest
from conftest import ROOT
from mmengine.config import Config
from mmengine.registry import DATASETS, TRANSFORMS, init_default_scope
from PIL import Image
from test_configs import CONFIGS, config_id

from mmlinglo.dataset_checks import CHECKS, check_datasets
from mmlinglo.dataset_checks.segmentation import Reading

TEMPLATES = dict(
    detection='retinanet_linglo-b0_fpn_1xb8-50e_custom',
    segmentation='fpn_linglo-b0_1xb8-8k_custom-512x512',
    classification='linglo-b0_1xb64-100e_custom',
)
CLASSES = dict(
    detection=('cat', 'dog'), segmentation=('sky', 'cat', 'dog'), classification=('cat', 'dog')
)
H, W = 32, 48


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (H, W, 3), dtype=np.uint8)


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def make_detection(root):
    """3 and 2 pictures, in each a box of each class."""
    for split, count in (('train', 3), ('val', 2)):
        images, annotations = [], []
        for i in range(1, count + 1):
            write(root / split / f'{i}.jpg', picture(i))
            images.append(dict(id=i, file_name=f'{i}.jpg', width=W, height=H))
            for category in (1, 2):
                box = [20 + category, 3, 10, 12]
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=i,
                        category_id=category,
                        bbox=box,
                        area=120,
                        iscrowd=0,
                    )
                )
        categories = [dict(id=1, name='cat'), dict(id=2, name='dog')]
        path = root / 'annotations' / f'{split}.json'
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            json.dumps(dict(images=images, annotations=annotations, categories=categories))
        )


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
        path = copy_template(task, folder, data_root=str(self.root), classes=CLASSES[task])
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


def for_task(task):
    return pytest.mark.parametrize('experiment', [task], indirect=True, ids=[task])


for_all = pytest.mark.parametrize('experiment', list(TEMPLATES), indirect=True)


@for_all
def test_clean_data_gives_no_findings(experiment):
    report = check_datasets(experiment.cfg)
    assert report.findings == []
    train, val = report.datasets['train'], report.datasets['val, test']
    count = 6 if experiment.task == 'classification' else 3
    assert (train['pictures'], train['opened'], train['classes']) == (
        count,
        count,
        len(CLASSES[experiment.task]),
    )
    assert val['pictures'] == count * 2 // 3
    assert report.format().endswith('\nno findings')


def test_templates_follow_their_variables(tmp_path):
    cfg = Config.fromfile(
        copy_template('detection', tmp_path, data_root='here', classes=tuple('abcde'))
    )
    assert cfg.model.bbox_head.num_classes == 5
    assert cfg.val_evaluator.ann_file == cfg.test_evaluator.ann_file == 'here/annotations/val.json'
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.data_root == 'here'
        assert loader.dataset.metainfo.classes == tuple('abcde')
        assert len({tuple(colour) for colour in loader.dataset.metainfo.palette}) == 5

    cfg = Config.fromfile(
        copy_template(
            'segmentation',
            tmp_path,
            data_root='here',
            classes=tuple('abcde'),
            ignore_index=7,
            reduce_zero_label=True,
            crop_size=64,
        )
    )
    assert cfg.model.decode_head.num_classes == 5
    assert cfg.model.data_preprocessor.size == (64, 64)
    places = (cfg.model.decode_head, cfg.val_evaluator, cfg.test_evaluator)
    assert [place.ignore_index for place in places] == [7, 7, 7]
    assert cfg.model.data_preprocessor.seg_pad_val == 7
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.data_root == 'here'
        assert loader.dataset.reduce_zero_label is True
        assert loader.dataset.metainfo.classes == tuple('abcde')
        assert len(loader.dataset.metainfo.palette) == 5

    cfg = Config.fromfile(
        copy_template('classification', tmp_path, data_root='here', classes=tuple('abc'))
    )
    assert cfg.model.head.num_classes == cfg.data_preprocessor.num_classes == 3
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.data_root == 'here'
        assert loader.dataset.metainfo.classes == tuple('abc')


def test_data_root_from_the_environment(tmp_path, monkeypatch):
    path = copy_template('detection', tmp_path, data_root='{{$DATA_ROOT:data/mine}}')
    assert Config.fromfile(path).val_evaluator.ann_file == 'data/mine/annotations/val.json'
    monkeypatch.setenv('DATA_ROOT', 'elsewhere')
    cfg = Config.fromfile(path)
    assert cfg.val_evaluator.ann_file == 'elsewhere/annotations/val.json'
    assert cfg.train_dataloader.dataset.data_root == 'elsewhere'


@pytest.mark.parametrize('task', list(TEMPLATES))
def test_templates_start_from_weights_if_given(task, tmp_path):
    scratch = Config.fromfile(copy_template(task, tmp_path))
    assert scratch.model.backbone.init_cfg is None
    tuned = Config.fromfile(copy_template(task, tmp_path, pretrained='weights.pth'))
    assert tuned.model.backbone.init_cfg == dict(
        type='Pretrained', checkpoint='weights.pth', prefix='backbone.'
    )
    assert tuned.optim_wrapper.optimizer.lr == 1e-4 < scratch.optim_wrapper.optimizer.lr


# ---- what all tasks have in common


@for_all
def test_variables_changed_too_late(experiment, tmp_path):
    """In a child config, or by --cfg-options, the variables change nothing but themselves."""
    child = tmp_path / 'child.py'
    child.write_text(
        f"_base_ = './{experiment.task}.py'\ndata_root = 'elsewhere/'\nclasses = ('a', 'b', 'c', 'd')\n"
    )
    experiment.cfg = Config.fromfile(child)
    found = experiment.findings()
    assert set(found) == {'variable-unused'}
    places = found['variable-unused'].places
    assert any("data_root = 'elsewhere/'" in place for place in places)
    assert any("('a', 'b', 'c', 'd')" in place for place in places)


@for_task('detection')
def test_data_root_of_a_data_set_may_be_overridden(experiment):
    experiment.cfg.data_root = 'elsewhere/'
    assert 'variable-unused' in experiment.findings()
    assert experiment.findings(overridden=['train_dataloader.dataset.data_root']) == {}


@for_all
def test_number_of_classes_of_the_head(experiment):
    head = {'detection': 'bbox_head', 'segmentation': 'decode_head', 'classification': 'head'}
    head = head[experiment.task]
    experiment.cfg.model[head].num_classes = 80
    found = experiment.findings()
    assert set(found) == {'num-classes'}
    assert found['num-classes'].places[0].startswith(f'model.{head}.num_classes = 80, train has ')


@for_all
def test_missing_folder(experiment):
    shutil.rmtree(experiment.root)
    found = experiment.findings()
    missing = 'annotations-missing' if experiment.task == 'detection' else 'folder-missing'
    assert set(found) == {missing}
    assert str(experiment.root) in found[missing].places[0]


@for_all
def test_training_data_as_validation_data(experiment):
    train = experiment.cfg.train_dataloader.dataset
    keys = [key for key in ('ann_file', 'data_prefix') if key in train]
    for split in ('val', 'test'):
        dataset = experiment.cfg[f'{split}_dataloader'].dataset
        dataset.update({key: train[key] for key in keys})
        if experiment.task == 'detection':
            path = f'{experiment.root}/annotations/train.json'
            experiment.cfg[f'{split}_evaluator'].ann_file = path
    assert set(experiment.findings()) == {'same-data'}


@for_all
@pytest.mark.parametrize(
    ('check', 'content'),
    [
        ('picture-unreadable', b''),
        ('picture-unreadable', b'no picture'),
        ('picture-truncated', None),
    ],
)
def test_damaged_pictures(experiment, check, content):
    folder = dict(detection='train', segmentation='images/training', classification='train/cat')
    path = experiment.root / folder[experiment.task] / '2.jpg'
    path.write_bytes(path.read_bytes()[:-400] if content is None else content)
    found = experiment.findings()
    assert set(found) == {check}
    assert len(found[check].places) == 1
    assert found[check].places[0].startswith(str(path))
    assert found[check].dataset == 'train'


@pytest.mark.parametrize('experiment', ['segmentation', 'classification'], indirect=True)
def test_other_suffix(experiment):
    folder = dict(segmentation='images/training', classification='train/cat')
    path = experiment.root / folder[experiment.task] / '7.webp'
    write(path, picture(7))
    found = experiment.findings()
    assert set(found) == {'picture-suffix'}
    assert found['picture-suffix'].places == [str(path)]


def test_only_a_sample_is_opened(tmp_path):
    experiment = Experiment('classification', tmp_path)
    report = check_datasets(experiment.cfg, num=3)
    assert report.datasets['train'] == dict(type='CustomDataset', pictures=6, opened=3, classes=2)
    (experiment.root / 'train/cat/0.jpg').write_bytes(b'')  # the first is always among them
    assert set(experiment.findings(num=1)) == {'picture-unreadable'}


def test_workers_find_the_same(tmp_path):
    experiment = Experiment('segmentation', tmp_path)
    (experiment.root / 'images/training/1.jpg').write_bytes(b'')
    alone, together = (check_datasets(experiment.cfg, workers=n).as_dict() for n in (1, 2))
    assert alone == together
    assert alone['errors'] == 1


# ---- boxes


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
    ('file-duplicate', same_file, 'train.json: 1.jpg', set()),
    ('annotation-duplicate', annotation_set('id', 2), 'id 2', set()),
    ('annotation-incomplete', annotation_without('area'), 'annotations[0] lacks area', set()),
    ('annotation-incomplete', annotation_without('bbox'), 'annotations[0] lacks bbox', set()),
    ('annotation-image', annotation_set('image_id', 99), 'annotation 1: image_id 99', set()),
    ('annotation-category', annotation_set('category_id', 9), 'annotation 1: category_id 9', set()),
    ('box-invalid', annotation_set('bbox', [1, 2, 3]), 'annotation 1, 1.jpg: [1, 2, 3]', set()),
    ('box-invalid', annotation_set('bbox', [1, 2, 3, float('nan')]), 'annotation 1, 1.jpg', set()),
    ('box-empty', annotation_set('bbox', [1, 2, 0, 5]), 'annotation 1, 1.jpg: [1, 2, 0, 5]', set()),
    ('box-empty', annotation_set('area', 0), 'annotation 1, 1.jpg', set()),
    ('box-outside', annotation_set('bbox', [W, 2, 5, 5]), f'annotation 1, 1.jpg: [{W}, 2', set()),
    ('box-outside', annotation_set('bbox', [-9, 2, 5, 5]), 'annotation 1, 1.jpg: [-9, 2', set()),
    ('box-sticks-out', annotation_set('bbox', [40, 2, 11, 5]), 'picture 48 x 32', set()),
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
    assert set(found) == {'image-duplicate'}
    assert found['image-duplicate'].places == [f'{experiment.annotations}/train.json: id 1']


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


# ---- label images


@for_task('segmentation')
def test_missing_and_superfluous_label_images(experiment):
    path = experiment.annotations / 'training/1.png'
    path.rename(path.with_name('9.png'))
    found = experiment.findings()
    assert set(found) == {'label-missing', 'label-unused'}
    assert found['label-missing'].places == [str(path)]
    assert found['label-unused'].places == [str(path.with_name('9.png'))]


@for_task('segmentation')
def test_no_pictures_of_the_suffix(experiment):
    experiment.set_datasets(img_suffix='.JPG')
    found = experiment.findings()
    assert set(found) == {'pictures-none', 'picture-suffix', 'label-unused', 'no-samples'}
    assert "no file ends in '.JPG'" in found['pictures-none'].places[0]


@for_task('segmentation')
@pytest.mark.parametrize(
    ('check', 'content'),
    [
        ('label-unreadable', b''),
        ('label-colours', np.zeros((H, W, 3), np.uint8)),
        ('label-size', np.zeros((H, W + 1), np.uint8)),
        ('labels-none', np.full((H, W), 255, np.uint8)),
        ('label-range', np.full((H, W), 77, np.uint8)),
        ('label-range', np.full((H, W), 256, np.uint16)),
    ],
)
def test_defects_of_a_label_image(experiment, check, content):
    path = experiment.annotations / 'training/1.png'
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write(path, content)
    found = experiment.findings()
    assert set(found) == {check}
    assert len(found[check].places) == 1
    assert found[check].places[0].startswith(str(path))


@for_task('segmentation')
def test_background_of_binary_masks(experiment):
    experiment.relabel({1: 0, 2: 0})
    assert set(experiment.findings()) == {'label-binary'}


@for_task('segmentation')
def test_zero_label_kept(experiment):
    """Labels 1 to 3 with 0 for unlabelled pixels, as ADE20K's, but reduce_zero_label is False."""
    experiment.relabel({0: 1, 1: 2, 2: 3})
    found = experiment.findings()
    assert {'zero-label-kept'} <= set(found) <= {'zero-label-kept', 'class-unseen'}
    assert 'numbers 1 to 3, 3 classes' in found['zero-label-kept'].places[0]
    experiment.set_datasets(reduce_zero_label=True)
    assert experiment.findings() == {}
    experiment.relabel({255: 0})
    assert experiment.findings() == {}


@for_task('segmentation')
def test_zero_label_dropped(experiment):
    experiment.set_datasets(reduce_zero_label=True)
    found = experiment.findings()
    assert set(found) == {'zero-label-dropped', 'class-unseen'}
    place = found['zero-label-dropped'].places[0]
    assert place.startswith(str(experiment.annotations))
    zeros = (H * W - 8 * W - 8 * 20 - 1) / (H * W)
    assert f'numbers 0 to 2, 3 classes, 0 in {zeros:.0%} of pixels' in place


@for_task('segmentation')
def test_places_that_must_agree(experiment):
    experiment.cfg.val_dataloader.dataset.pipeline[3].reduce_zero_label = True
    found = experiment.findings()
    assert 'zero-label-differs' in found
    assert 'LoadAnnotations of val: True' in found['zero-label-differs'].places[0]
    del experiment.cfg.val_dataloader.dataset.pipeline[3]['reduce_zero_label']
    experiment.cfg.val_evaluator.ignore_index = 11
    found = experiment.findings()
    assert set(found) == {'ignore-index'}
    assert 'val_evaluator.ignore_index 11' in found['ignore-index'].places[0]


@for_task('segmentation')
def test_another_ignored_label(experiment):
    """As CamVid's 11 after its classes 0 to 10."""
    experiment.relabel({255: 3})
    assert set(experiment.findings()) == {'zero-label-kept'}
    experiment.cfg.model.decode_head.ignore_index = 3
    experiment.cfg.model.data_preprocessor.seg_pad_val = 3
    experiment.cfg.val_evaluator.ignore_index = experiment.cfg.test_evaluator.ignore_index = 3
    assert experiment.findings() == {}


@for_task('segmentation')
def test_class_without_pixels(experiment):
    experiment.relabel({2: 0}, splits=['training'])
    found = experiment.findings()
    assert set(found) == {'class-unseen'}
    assert found['class-unseen'].places == ["'dog': no pixel in 3 label images"]


@pytest.mark.parametrize('reduce_zero_label', [False, True])
@pytest.mark.parametrize('label_map', [None, {0: 1, 1: 255, 2: 0}])
def test_labels_become_classes_as_in_mmseg(reduce_zero_label, label_map, tmp_path):
    path = tmp_path / 'labels.png'
    write(path, np.arange(256, dtype=np.uint8).reshape(16, 16))
    init_default_scope('mmseg')
    loaded = TRANSFORMS.build(dict(type='LoadAnnotations'))(
        dict(
            seg_map_path=str(path),
            reduce_zero_label=reduce_zero_label,
            label_map=label_map,
            seg_fields=[],
        )
    )
    reading = Reading(3, reduce_zero_label, label_map, ignore_index=255)
    for number, expected in enumerate(loaded['gt_seg_map'].ravel().tolist()):
        inside = expected in (0, 1, 2, 255)
        assert reading.class_of(number) == (expected if inside else None)


# ---- class folders


@for_task('classification')
def test_flat_validation_folder(experiment):
    folder = experiment.root / 'val'
    for path in sorted(folder.rglob('*.jpg')):
        path.rename(folder / f'{path.parent.name}{path.name}')
    for name in CLASSES['classification']:
        (folder / name).rmdir()
    found = experiment.findings()
    assert set(found) == {'folder-flat', 'no-samples'}
    assert found['folder-flat'].places == [f'{folder}: 4 pictures, no folders']


@for_task('classification')
def test_pictures_beside_the_folders(experiment):
    path = experiment.root / 'val/lost.jpg'
    write(path, picture(0))
    found = experiment.findings()
    assert set(found) == {'file-stray'}
    assert found['file-stray'].places == [str(path)]


@for_task('classification')
def test_folders_of_training_and_validation_differ(experiment):
    (experiment.root / 'val/dog').rename(experiment.root / 'val/bird')
    found = experiment.findings()
    assert set(found) == {'folders-differ', 'folder-name'}
    assert found['folders-differ'].places == ['only in val, test: bird; only in train: dog']
    shutil.rmtree(experiment.root / 'val/bird')
    found = experiment.findings()
    assert set(found) == {'folders-differ', 'folder-count'}
    assert '1 folders, 2 classes; without a folder: dog' in found['folder-count'].places[0]


@for_task('classification')
def test_empty_and_hidden_folders(experiment):
    hidden = experiment.root / 'train/.cache'
    hidden.mkdir()
    found = experiment.findings()
    assert set(found) == {'folder-hidden', 'folder-count', 'folders-differ'}
    assert found['folder-hidden'].places == [str(hidden)]
    # mmpretrain does what the finding says
    init_default_scope('mmpretrain')
    dataset = {**experiment.cfg.train_dataloader.dataset, 'metainfo': None, 'pipeline': []}
    assert DATASETS.build(dataset).metainfo['classes'] == ('.cache', 'cat', 'dog')
    hidden.rmdir()
    for path in (experiment.root / 'train/dog').iterdir():
        path.unlink()
    found = experiment.findings()
    assert set(found) == {'folder-empty'}
    assert found['folder-empty'].places == [f'{experiment.root}/train/dog']


@for_task('classification')
def test_names_of_folders(experiment):
    experiment.set_datasets(metainfo=dict(classes=('dog', 'cat')))
    experiment.cfg.pop('classes')
    found = experiment.findings()
    assert set(found) == {'folder-order'}
    assert "folder 'cat' gets the name 'dog'" in found['folder-order'].places[0]
    experiment.set_datasets(metainfo=dict(classes=('Katze', 'Hund')))
    assert set(experiment.findings()) == {'folder-name'}


@for_task('classification')
def test_annotation_file_of_class_numbers(experiment):
    path = experiment.root / 'val.txt'
    path.write_text('cat/0.jpg 0\ndog/0.jpg 1\ncat/1.jpg 2\ncat/1.jpg\ndog/9.jpg 1\n')
    for split in ('val', 'test'):
        experiment.cfg[f'{split}_dataloader'].dataset.ann_file = 'val.txt'
    found = experiment.findings()
    assert set(found) == {'class-number', 'line-invalid', 'picture-missing'}
    assert found['class-number'].places == [f'{path}, line 3: class 2, 2 classes']
    assert found['line-invalid'].places[0].startswith(f'{path}, line 4')
    assert found['picture-missing'].places == [f'{experiment.root}/val/dog/9.jpg']


@for_task('classification')
def test_batches_and_top_k(experiment):
    experiment.cfg.train_dataloader.drop_last = True
    experiment.cfg.val_evaluator.topk = (1, 5)
    found = experiment.findings()
    assert set(found) == {'no-samples', 'topk'}
    assert found['no-samples'].places == ['6 samples, batch_size 64, drop_last True']
    assert found['topk'].places == ['val_evaluator.topk = (1, 5), 2 classes']


def test_imagenet_with_a_flat_validation_folder(tmp_path):
    """The recipe itself: folders are named by WordNet ids, classes by words."""
    cfg = Config.fromfile(ROOT / 'configs/imagenet/linglo-b0_8xb128_in1k.py')
    for i in range(1000):
        (tmp_path / f'train/n{i:08d}').mkdir(parents=True)
    write(tmp_path / 'train/n00000000/1.jpg', picture(0))
    write(tmp_path / 'val/1.jpg', picture(0))
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.data_root = str(tmp_path)
    report = check_datasets(cfg, overridden=['train_dataloader.dataset.data_root'])
    found = {finding.check: finding for finding in report.findings}
    assert set(found) == {'folder-flat', 'folder-empty', 'no-samples'}
    assert len(found['folder-empty'].places) == 999
    text = report.format()
    assert 'and 996 more' in text
    assert len(text.splitlines()) < 30


def test_data_sets_that_download_themselves_do_not(tmp_path, monkeypatch):
    import urllib.request

    monkeypatch.setattr(urllib.request, 'urlopen', lambda *_, **__: pytest.fail('a download'))
    cfg = Config.fromfile(ROOT / 'configs/cifar10/linglo-b0_1xb128-30e_cifar10.py')
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.data_root = str(tmp_path)
    report = check_datasets(cfg, overridden=['train_dataloader.dataset.data_root'])
    assert {finding.check for finding in report.findings} == {'dataset-unbuildable'}
    assert str(tmp_path) in report.findings[0].places[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('path', CONFIGS, ids=config_id)
def test_every_config_can_be_checked(path, tmp_path, monkeypatch):
    """Far from all data, that is all that is missing."""
    monkeypatch.chdir(tmp_path)
    report = check_datasets(Config.fromfile(path))
    assert report.findings
    missing = {'annotations-missing', 'folder-missing'}
    if report.datasets['train']['type'] == 'CIFAR10':
        missing = {'dataset-unbuildable'}
    assert {finding.check for finding in report.findings} <= missing
    assert not list(tmp_path.iterdir())


def test_other_types_of_data_sets(tmp_path):
    """OpenMMLab's own annotation format, as mmdet's base class reads it."""
    experiment = Experiment('detection', tmp_path)
    content = dict(
        metainfo=dict(classes=('cat', 'dog')),
        data_list=[dict(img_path=f'{i}.jpg', instances=[]) for i in (1, 2, 7)],
    )
    (experiment.annotations / 'own.json').write_text(json.dumps(content))
    dataset = experiment.cfg.train_dataloader.dataset
    dataset.update(type='BaseDetDataset', ann_file='annotations/own.json')
    dataset.data_prefix = dict(img_path='train')
    found = experiment.findings()
    assert set(found) == {'dataset-unknown', 'picture-missing'}
    assert found['picture-missing'].places == [f'{experiment.root}/train/7.jpg']


def test_unknown_settings_of_a_data_set(tmp_path):
    experiment = Experiment('segmentation', tmp_path)
    experiment.cfg.train_dataloader.dataset.image_suffix = '.png'
    found = experiment.findings()
    assert set(found) == {'dataset-unbuildable'}
    assert 'image_suffix' in found['dataset-unbuildable'].places[0]


def test_each_check_is_documented():
    text = (ROOT / 'docs/custom_dataset.md').read_text()
    listed = re.findall(r'^\| `([a-z-]+)` \| (error|warning) \| (.*) \|$', text, flags=re.M)
    assert listed == [(key, c.severity, c.problem) for key, c in CHECKS.items()]

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""What data sets of all tasks have in common."""

import json
import re
import shutil

import pytest
from conftest import ROOT
from dataset_experiment import (
    CLASSES,
    TEMPLATES,
    Experiment,
    copy_template,
    for_all,
    for_task,
    picture,
    write,
)
from mmengine.config import Config
from test_configs import CONFIGS, config_id

from mmlinglo.dataset_checks import CHECKS, check_datasets

pytest_plugins = ['dataset_experiment']


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
    assert set(experiment.findings(overridden=['data_root'])) == {'variable-unused'}
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
    experiment.cfg.train_dataloader.dataset.indices = [1, -1]
    for indices, expected in ((1, set()), ([0], set()), (2, {'same-data'}), ([-1], {'same-data'})):
        for split in ('val', 'test'):
            experiment.cfg[f'{split}_dataloader'].dataset.indices = indices
        assert set(experiment.findings()) == expected


@for_all
@pytest.mark.parametrize(
    ('check', 'content'),
    [
        ('picture-unreadable', b''),
        ('picture-unreadable', b'no picture'),
        # Pillow raises ValueError on both.
        ('picture-unreadable', b'\x89PNG\r\n\x1a\n\0\0\0\5IHDR' + bytes(400)),
        ('picture-unreadable', b'P6\n48 32\n0\n' + bytes(48 * 32 * 3)),
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

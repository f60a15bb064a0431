# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Settings of a config that do not fit the data, or each other."""

import copy
import json
import os

import mmdet
import numpy as np
import pytest
from conftest import ROOT
from dataset_experiment import H, W, copy_template, for_task, write
from mmengine.config import Config

pytest_plugins = ['dataset_experiment']
MMDET = os.path.join(os.path.dirname(mmdet.__file__), '.mim/configs')


def places(experiment, check):
    """Places of the one finding, which must be that of ``check``; none if there is no finding."""
    found = experiment.findings()
    assert set(found) <= {check}, found
    return found[check].places if found else []


@for_task('detection')
@pytest.mark.parametrize('use_sigmoid', [True, False])
@pytest.mark.parametrize('number', [2, 3])
def test_class_weights_of_a_detector(experiment, use_sigmoid, number):
    experiment.cfg.model.bbox_head.loss_cls = dict(
        type='CrossEntropyLoss', use_sigmoid=use_sigmoid, class_weight=number * [1.0]
    )
    needed = '2 are needed' if use_sigmoid else '3 are needed (with one for the background)'
    expected = f'model.bbox_head.loss_cls: class_weight has {number} values, {needed}'
    fits = number == (2 if use_sigmoid else 3)
    assert places(experiment, 'class-weight') == ([] if fits else [expected])


@for_task('segmentation')
@pytest.mark.parametrize('number', [2, 3, 4])
@pytest.mark.parametrize('several', [True, False])
def test_class_weights_of_a_segmentor(experiment, number, several):
    loss = dict(type='CrossEntropyLoss', use_sigmoid=False, class_weight=number * [1.0])
    experiment.cfg.model.decode_head.loss_decode = (
        [loss, dict(type='DiceLoss')] if several else loss
    )
    where = 'model.decode_head.loss_decode' + '.0' * several
    expected = f'{where}: class_weight has {number} values, 3 are needed'
    assert places(experiment, 'class-weight') == ([] if number == 3 else [expected])


@for_task('segmentation')
@pytest.mark.parametrize('suffix', ['.json', '.npy'])
def test_class_weights_in_a_file(experiment, tmp_path, suffix):
    path = tmp_path / f'weights{suffix}'
    experiment.cfg.model.decode_head.loss_decode.class_weight = str(path)
    start = f'model.decode_head.loss_decode: class_weight of {str(path)!r}'
    (place,) = places(experiment, 'class-weight')
    assert place.startswith(f'{start} cannot be read: ')
    for number in (3, 4):
        if suffix == '.npy':
            np.save(path, np.ones(number))
        else:
            path.write_text(json.dumps(number * [1.0]))
        expected = f'{start} has 4 values, 3 are needed'
        assert places(experiment, 'class-weight') == ([] if number == 3 else [expected])


@for_task('classification')
def test_class_weights_of_a_classifier(experiment):
    loss = dict(type='CrossEntropyLoss', class_weight=[1.0, 2.0, 3.0])
    experiment.cfg.model.head.loss = loss
    expected = ['model.head.loss: class_weight has 3 values, 2 are needed']
    assert places(experiment, 'class-weight') == expected


@for_task('segmentation')
def test_one_output_for_two_classes(experiment, tmp_path):
    experiment.relabel({2: 1})
    path = copy_template(
        'segmentation', tmp_path, data_root=str(experiment.root), classes=('a', 'b')
    )
    experiment.cfg = Config.fromfile(path)
    assert places(experiment, 'out-channels') == []
    head = experiment.cfg.model.decode_head
    head.out_channels = 1
    assert places(experiment, 'out-channels') == [
        'model.decode_head: out_channels = 1, num_classes = 2, and a softmax loss (use_sigmoid=False)'
    ]
    head.loss_decode.use_sigmoid = True
    assert places(experiment, 'out-channels') == []


@for_task('detection')
def test_things_of_a_mask_transformer(experiment):
    recipe = ROOT / 'configs/coco/mask2former_linglo-b1_8xb2-lsj-50e_coco.py'
    experiment.cfg.model = model = Config.fromfile(recipe).model
    model.panoptic_head.loss_cls.class_weight = [1.0, 1.0, 0.1]
    names = ['panoptic_fusion_head', 'panoptic_head']
    assert places(experiment, 'num-classes') == [
        f'model.{name}.num_things_classes + num_stuff_classes = 80 + 0 = 80, train has 2'
        for name in names
    ]
    for name in names:
        model[name].update(num_things_classes=2, num_stuff_classes=0)
    assert places(experiment, 'num-classes') == []


@pytest.fixture
def two_sizes(experiment):
    """Validation images of 48 x 32 and 48 x 64 pixels."""
    write(experiment.root / 'images/validation/1.jpg', np.zeros((2 * H, W, 3), np.uint8))
    labels = np.repeat(np.arange(4, dtype=np.uint8) % 3, 2 * H // 4)
    write(
        experiment.annotations / 'validation/1.png',
        np.ascontiguousarray(labels[:, None].repeat(W, 1)),
    )


@for_task('segmentation')
def test_batches_of_images_of_equal_size(experiment):
    for split in ('val', 'test'):
        experiment.cfg[f'{split}_dataloader'].batch_size = 2
    assert places(experiment, 'batch-shapes') == []


@for_task('segmentation')
def test_batches_of_images_of_two_sizes(experiment, two_sizes):  # noqa: ARG001
    assert places(experiment, 'batch-shapes') == []
    for split in ('val', 'test'):
        experiment.cfg[f'{split}_dataloader'].batch_size = 2
    (place,) = places(experiment, 'batch-shapes')
    assert place.startswith('batch_size = 2, ')
    assert 'validation/0.jpg: 768 x 512' in place
    assert 'validation/1.jpg: 512 x ' in place


@for_task('segmentation')
@pytest.mark.parametrize(
    ('crop_size', 'stride'),
    [
        (64, (42, 42)),
        ((64, 64), None),
        ((32, 32), (64, 64)),
        ((64, 64), (0, 42)),
        (('64', '64'), (42, 42)),
        ((64, 64), (42.5, 42)),
    ],
)
def test_sliding_windows_that_fail(experiment, crop_size, stride):
    settings = dict(mode='slide', crop_size=crop_size)
    if stride is not None:
        settings.update(stride=stride)
    experiment.cfg.model.test_cfg = settings
    expected = [f'model.test_cfg: crop_size = {crop_size}, stride = {stride}']
    assert places(experiment, 'slide-window') == expected


@for_task('segmentation')
def test_sliding_windows_larger_than_the_images(experiment):
    experiment.cfg.model.test_cfg = dict(mode='slide', crop_size=(1024, 1024), stride=(600, 600))
    found = places(experiment, 'slide-small')
    assert found
    assert all(place.endswith('crop_size 1024 x 1024') for place in found)
    experiment.cfg.model.test_cfg = dict(mode='slide', crop_size=(64, 64), stride=(42, 42))
    assert places(experiment, 'slide-small') == []


@for_task('classification')
def test_last_batch_of_one_image(experiment):
    """At 32 px the last maps are 1 x 1, of which a batch norm in training needs two."""
    loader = experiment.cfg.train_dataloader
    assert loader.drop_last  # in the template
    loader.drop_last = False
    for step in loader.dataset.pipeline:
        if 'scale' in step:
            step.scale = 32
    for batch_size, is_found in ((5, True), (3, False), (1, True)):
        loader.batch_size = batch_size
        expected = [f'6 samples, batch_size {batch_size}, input 32 x 32']
        assert places(experiment, 'last-batch') == (expected if is_found else [])
    loader.dataset = dict(type='RepeatDataset', times=2, dataset=loader.dataset)
    for batch_size, is_found in ((11, True), (5, False)):
        loader.batch_size = batch_size
        expected = [f'12 samples, batch_size {batch_size}, input 32 x 32']
        assert places(experiment, 'last-batch') == (expected if is_found else [])


@for_task('detection')
@pytest.mark.parametrize(('size', 'is_found'), [(32, True), (64, False)])
def test_last_batch_of_a_detector(experiment, size, is_found):
    loader = experiment.cfg.train_dataloader
    loader.batch_size = 2
    for step in loader.dataset.pipeline:
        if 'scale' in step:
            step.scale = (size, size)
    expected = ['3 samples, batch_size 2, input 32 x 32']
    assert places(experiment, 'last-batch') == (expected if is_found else [])


@for_task('classification')
@pytest.mark.parametrize(
    ('size', 'stages', 'smallest'), [(28, 4, 32), (32, 4, 0), (28, 2, 0), (7, 2, 8)]
)
def test_inputs_of_a_classifier_below_the_smallest(experiment, size, stages, smallest):
    experiment.cfg.model.backbone.out_indices = (stages - 1,)
    for step in experiment.cfg.train_dataloader.dataset.pipeline:
        if 'scale' in step:
            step.scale = size
    expected = [f'input {size} x {size}, smallest {smallest} x {smallest}']
    assert places(experiment, 'input-small') == (expected if smallest else [])


@for_task('segmentation')
def test_crops_of_a_segmentor_below_the_smallest(experiment):
    for step in experiment.cfg.train_dataloader.dataset.pipeline:
        if 'crop_size' in step:
            step.crop_size = (16, 16)
    assert places(experiment, 'input-small') == []  # the preprocessor pads to 512 x 512
    experiment.cfg.model.data_preprocessor.size = (16, 16)
    assert places(experiment, 'input-small') == ['input 16 x 16, smallest 32 x 32']


@for_task('detection')
@pytest.mark.parametrize(('divisor', 'is_found'), [(32, False), (1, True)])
def test_inputs_of_a_detector_below_the_smallest(experiment, divisor, is_found):
    experiment.cfg.model.data_preprocessor.pad_size_divisor = divisor
    for step in experiment.cfg.train_dataloader.dataset.pipeline:
        if 'scale' in step:
            step.scale = (16, 16)
    expected = ['input 16 x 11, smallest 32 x 32']
    assert places(experiment, 'input-small') == (expected if is_found else [])


@for_task('detection')
def test_a_data_set_without_a_pipeline(experiment):
    experiment.cfg.train_dataloader.dataset.pipeline = None
    assert experiment.findings() == {}


@for_task('detection')
@pytest.mark.parametrize(
    'base',
    [
        ROOT / 'configs/coco/retinanet_linglo-b0_fpn_1x_coco.py',
        ROOT / 'configs/quickstart/retinanet_linglo-b0_fpn_2xb4-3e_shapes.py',
        ROOT / 'configs/custom/retinanet_linglo-b0_fpn_1xb8-50e_custom.py',
        f'{MMDET}/retinanet/retinanet_r50_fpn_1x_coco.py',
    ],
    ids=['coco', 'quickstart', 'custom', 'mmdet'],
)
def test_paths_in_the_data_set_alone(experiment, tmp_path, base):
    """No false alarm for a variable of the base that the path no longer comes from."""
    cfg = Config.fromfile(base)
    root = f'{experiment.root}/'
    names = dict(classes=('cat', 'dog'), palette=[(0, 0, 0), (255, 0, 0)])
    lines = [f'_base_ = {str(base)!r}']
    for split, name in (('train', 'train'), ('val', 'val'), ('test', 'val')):
        settings = dict(
            data_root=root,
            metainfo=copy.deepcopy(names),
            ann_file=f'annotations/{name}.json',
            data_prefix=dict(img=f'{name}/'),
        )
        lines.append(f'{split}_dataloader = dict(dataset={settings!r})')
    lines += [f"val_evaluator = dict(ann_file='{root}annotations/val.json')"]
    lines += ['test_evaluator = val_evaluator', 'model = dict(bbox_head=dict(num_classes=2))']
    (tmp_path / 'config.py').write_text('\n'.join(lines))
    assert 'data_root' in cfg
    experiment.cfg = Config.fromfile(tmp_path / 'config.py')
    assert experiment.findings() == {}

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Defects planted in small clean data sets are found, each by its name, in the right file, and nothing else."""

import numpy as np
import pytest
from dataset_experiment import H, W, for_task, write
from mmengine.registry import TRANSFORMS, init_default_scope

from mmlinglo.dataset_checks.segmentation import class_numbers

pytest_plugins = ['dataset_experiment']


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
    table = class_numbers(3, reduce_zero_label, label_map, ignore_index=255)
    for number, expected in enumerate(loaded['gt_seg_map'].ravel().tolist()):
        inside = expected in (0, 1, 2, 255)
        assert table.get(number) == (expected if inside else None)

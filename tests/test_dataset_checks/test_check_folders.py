# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Defects planted in small clean data sets are found, each by its name, in the right file, and nothing else."""

import shutil

import pytest
from conftest import ROOT
from dataset_experiment import CLASSES, for_task, picture, write
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from mmlinglo.dataset_checks import check_datasets

pytest_plugins = ['dataset_experiment']


@for_task('classification')
def test_flat_validation_folder(experiment):
    folder = experiment.root / 'val'
    for path in sorted(folder.rglob('*.jpg')):
        path.rename(folder / f'{path.parent.name}{path.name}')
    for name in CLASSES['classification']:
        (folder / name).rmdir()
    found = experiment.findings()
    assert set(found) == {'folder-flat', 'no-samples'}
    assert found['folder-flat'].places == [f'{folder}: 4 images, no folders']


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


@for_task('classification', 'segmentation')
@pytest.mark.parametrize(
    ('encoding', 'problem'),
    [
        ('utf-8-sig', 'starts with a byte-order mark'),
        ('utf-16', 'is UTF-16 or UTF-32: save it as UTF-8'),
    ],
)
def test_lists_in_another_encoding(experiment, encoding, problem):
    path = experiment.root / 'train.txt'
    path.write_text('cat/0.jpg 0\ndog/0.jpg 1\n', encoding=encoding)
    experiment.cfg.train_dataloader.dataset.ann_file = 'train.txt'
    found = experiment.findings()
    assert set(found) == {'annotations-unreadable'}
    assert found['annotations-unreadable'].places[0].startswith(f'{path}: the text {problem}')


@for_task('classification')
def test_batches_and_top_k(experiment):
    experiment.cfg.train_dataloader.batch_size = 64
    experiment.cfg.val_evaluator.topk = (1, 5)
    found = experiment.findings()
    assert set(found) == {'no-samples', 'topk'}
    assert found['no-samples'].places == ['6 samples, batch_size 64, drop_last True']
    assert found['topk'].places == ['val_evaluator.topk = (1, 5), 2 classes']


@for_task('classification')
def test_indices_of_a_data_set(experiment):
    dataset = experiment.cfg.train_dataloader.dataset
    experiment.cfg.train_dataloader.batch_size = 6
    for indices, count in ((1, 1), (-5, 5), ([0, 3, -1], 3)):
        dataset.indices = indices
        (place,) = experiment.findings()['no-samples'].places
        assert f'{count} samples' in place
        init_default_scope('mmpretrain')
        assert len(DATASETS.build({**dataset, 'pipeline': []})) == count
    dataset.indices = [6]
    found = experiment.findings()
    assert set(found) == {'dataset-unbuildable'}
    assert found['dataset-unbuildable'].places[0].startswith('indices = [6] of 6 samples: ')


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

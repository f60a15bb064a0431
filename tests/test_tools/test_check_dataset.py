# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import json
import shutil

import pytest
from conftest import ROOT, run_tool

pytestmark = pytest.mark.slow
TOOL = 'tools/misc/check_dataset.py'
DETECTOR = ROOT / 'configs/quickstart/retinanet_linglo-b0_fpn_2xb4-3e_shapes.py'
SEGMENTOR = ROOT / 'configs/quickstart/fpn_linglo-b0_2xb4-360_shapes-160x160.py'
CLASSIFIER = ROOT / 'configs/quickstart/linglo-b0_2xb16-8e_shapes.py'


def options(root, evaluator=None):
    """Settings that point all data sets of a config to another folder."""
    splits = ('train', 'val', 'test')
    settings = [f'{split}_dataloader.dataset.data_root={root}/' for split in splits]
    if evaluator is not None:
        settings += [f'{split}_evaluator.ann_file={root}/{evaluator}' for split in splits[1:]]
    return ['--cfg-options', *settings]


@pytest.mark.parametrize(
    ('config', 'folder', 'evaluator'),
    [
        (DETECTOR, 'coco', 'annotations/val.json'),
        (SEGMENTOR, 'ade', None),
        (CLASSIFIER, 'imagenet', None),
    ],
    ids=['detection', 'segmentation', 'classification'],
)
def test_quickstart_data_is_clean(shapes, config, folder, evaluator, tmp_path):
    out = tmp_path / 'report.json'
    result = run_tool(TOOL, config, '--out', out, *options(shapes / folder, evaluator))
    assert result.stdout.strip().endswith('no findings')
    report = json.loads(out.read_text())
    assert report['config'] == str(config)
    assert report['datasets']['train']['pictures'] == report['datasets']['train']['opened'] == 16
    assert (report['errors'], report['warnings'], report['findings']) == (0, 0, [])


def test_errors_and_warnings(shapes, tmp_path):
    root, out = tmp_path / 'coco', tmp_path / 'report.json'
    shutil.copytree(shapes / 'coco', root)
    path = root / 'annotations/train.json'
    content = json.loads(path.read_text())
    content['annotations'][0]['bbox'][0] += 50  # sticks out of 64 pixels
    path.write_text(json.dumps(content))
    settings = options(root, 'annotations/val.json')
    result = run_tool(TOOL, DETECTOR, *settings)
    assert 'warning in train: ' in result.stdout
    assert result.stdout.strip().endswith('1 warning')  # and exit status 0

    for name in ('000001.jpg', '000003.jpg'):
        (root / 'train' / name).unlink()
    result = run_tool(TOOL, DETECTOR, '--out', out, '--places', 1, *settings, check=False)
    assert result.returncode == 1
    assert 'error in train, 2 times: ' in result.stdout
    assert f'    {root}/train/000001.jpg\n    and 1 more\n  remedy: ' in result.stdout
    assert result.stdout.strip().endswith('1 error, 1 warning')
    finding = json.loads(out.read_text())['findings'][0]
    assert (finding['check'], finding['severity']) == ('picture-missing', 'error')
    assert finding['places'] == [f'{root}/train/{name}' for name in ('000001.jpg', '000003.jpg')]


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['nowhere.py'], "config 'nowhere.py' not found"),
        ([DETECTOR, '--num', '0'], '--num must be a positive number or "all", got \'0\''),
        ([DETECTOR, '--workers', '0'], 'must be positive'),
    ],
)
def test_mistakes(args, message):
    result = run_tool(TOOL, *args, check=False)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith('error: ')
    assert message in result.stderr

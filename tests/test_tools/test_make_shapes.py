# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import json

import cv2
import numpy as np
from conftest import ROOT, import_tool, run_tool
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope


def test_the_three_layouts_show_the_same_scenes(shapes):
    coco = json.loads((shapes / 'coco/annotations/train.json').read_text())
    assert len(coco['images']) == 16
    names = {c['id']: c['name'] for c in coco['categories']}
    for image in coco['images']:
        stem = image['file_name'][:-4]
        picture = (shapes / 'coco/train' / image['file_name']).read_bytes()
        assert (shapes / 'ade/images/training' / image['file_name']).read_bytes() == picture
        labels = cv2.imread(str(shapes / f'ade/annotations/training/{stem}.png'), 0)
        objects = [a for a in coco['annotations'] if a['image_id'] == image['id']]
        assert objects
        assert set(np.unique(labels)) == {1} | {1 + a['category_id'] for a in objects}
        for item in objects:
            x, y, w, h = item['bbox']
            inside = labels[y : y + h, x : x + w] == 1 + item['category_id']
            # the box is tight
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
            assert 0 < item['area'] <= w * h
        largest = max(objects, key=lambda a: a['bbox'][2] * a['bbox'][3])
        scene_class = names[largest['category_id']]
        assert (
            shapes / 'imagenet/train' / scene_class / image['file_name']
        ).read_bytes() == picture
    assert len(list((shapes / 'imagenet/val').rglob('*.jpg'))) == 8
    assert len(list((shapes / 'demo').glob('*.jpg'))) == 2


def make_shapes(*args):
    assert import_tool('tools/misc/make_shapes.py').main([*map(str, args)]) == 0


def test_seeded(shapes, tmp_path):
    """The same seed gives the same scenes, also of one split when the other has another size."""
    out = tmp_path / 'again'
    args = ['--num-train', 3, '--num-val', 8, '--num-demo', 0, '--size', 64]
    make_shapes(out, *args)
    for path in (out / 'coco/val').iterdir():
        assert path.read_bytes() == (shapes / 'coco/val' / path.name).read_bytes()
    make_shapes(tmp_path / 'other', *args, '--seed', 1)
    first = 'coco/val/000000.jpg'
    assert (tmp_path / 'other' / first).read_bytes() != (out / first).read_bytes()


def test_never_overwrites(shapes, capsys):
    make_shapes(shapes, *'--num-train 16 --num-val 8 --num-demo 2 --size 64'.split())
    assert 'exists already' in capsys.readouterr().out
    result = run_tool('tools/misc/make_shapes.py', shapes, check=False)
    assert result.returncode == 1
    assert f'\nerror: {shapes} exists' in f'\n{result.stderr}'
    assert not list(shapes.parent.glob('.shapes-*'))


def test_classifier_names_its_labels_rightly(shapes):
    """Labels follow the sorted folders: names in another order would be drawn on the wrong pictures."""
    cfg = Config.fromfile(ROOT / 'configs/quickstart/linglo-b0_2xb16-8e_shapes.py')
    init_default_scope(cfg.default_scope)
    cfg.val_dataloader.dataset.data_root = str(shapes / 'imagenet')
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        assert dataset.metainfo['classes'][info['gt_label']] == info['img_path'].split('/')[-2]

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Pictures and labels that are not as they should be, in the training pipelines of the three tasks."""

import io
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader

from mmlinglo.engine import PictureErrorsHook, TrainingError

CONFIGS = dict(
    classification='linglo-b0_2xb16-8e_shapes.py',
    detection='retinanet_linglo-b0_fpn_2xb4-3e_shapes.py',
    segmentation='fpn_linglo-b0_2xb4-360_shapes-160x160.py',
)
FOLDERS = dict(classification='imagenet', detection='coco/', segmentation='ade')


def encoded(picture, suffix, **kwargs):
    file = io.BytesIO()
    picture.save(file, suffix, **kwargs)
    return file.getvalue()


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    return exif


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
DEEP = Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (64, 64), dtype=np.uint16))
UNREADABLE = dict(
    zero_byte=b'',
    no_picture=b'<html>not found</html>',
    header_only=encoded(NOISE, 'JPEG')[:100],
    truncated_png=encoded(NOISE, 'PNG')[:5000],
    truncated_jpeg=encoded(NOISE, 'JPEG')[:-100],
    missing=None,
)
READABLE = dict(
    cmyk=encoded(NOISE.convert('CMYK'), 'JPEG'),
    grey=encoded(NOISE.convert('L'), 'JPEG'),
    sixteen_bit=encoded(DEEP, 'PNG'),
    palette=encoded(NOISE.convert('P'), 'PNG'),
    alpha=encoded(NOISE.convert('RGBA'), 'PNG'),
    one_pixel=encoded(NOISE.resize((1, 1)), 'PNG'),
    exif_rotated=encoded(NOISE, 'JPEG', exif=rotated()),
)


class FakeRunner:
    def __init__(self, dataset):
        self.train_dataloader = DataLoader(dataset)


@pytest.fixture
def dataset(request, shapes, tmp_path):
    """Training data of a task, the errors of which name their files."""
    config = Config.fromfile(ROOT / 'configs/quickstart' / CONFIGS[request.param])
    shutil.copytree(shapes / FOLDERS[request.param], tmp_path / 'data')
    init_default_scope(config.default_scope)
    settings = dict(config.train_dataloader.dataset, data_root=f'{tmp_path}/data/')
    dataset = DATASETS.build(settings)
    PictureErrorsHook().before_train(FakeRunner(dataset))
    return dataset


def replace_picture(dataset, content, key='img_path'):
    path = dataset.get_data_info(0)[key]
    with open(path, 'wb') as file:
        file.write(content or b'')
    if content is None:
        shutil.os.remove(path)
    return path


tasks = pytest.mark.parametrize('dataset', CONFIGS, indirect=True)


@tasks
def test_errors_name_the_picture(dataset):
    for kind, content in UNREADABLE.items():
        path = replace_picture(dataset, content)
        with pytest.raises(TrainingError) as caught:
            dataset[0]
        assert str(caught.value).startswith(path), kind
        assert '\n' not in str(caught.value)


@tasks
def test_what_can_be_read_has_three_channels_of_eight_bits(dataset):
    for kind, content in READABLE.items():
        replace_picture(dataset, content)
        inputs = dataset[0]['inputs']
        assert inputs.shape[0] == 3, kind
        assert inputs.dtype == torch.uint8


@pytest.mark.parametrize('dataset', ['segmentation'], indirect=True)
def test_errors_name_the_label_image(dataset):
    for kind in ('zero_byte', 'no_picture', 'truncated_png', 'missing'):
        path = replace_picture(dataset, UNREADABLE[kind], 'seg_map_path')
        with pytest.raises(TrainingError, match=f'with {path}: '):
            dataset[0]


@pytest.mark.parametrize('dataset', ['classification'], indirect=True)
def test_errors_pass_through_data_workers_and_wrappers(dataset):
    path = replace_picture(dataset, b'')
    both = ConcatDataset([dataset, dataset])
    PictureErrorsHook().before_train(FakeRunner(both))  # not named twice
    loader = DataLoader(pickle.loads(pickle.dumps(both)), num_workers=1)
    with pytest.raises(TrainingError, match=f'(?s)DataLoader worker.*TrainingError: {path}: error'):
        next(iter(loader))


@pytest.mark.parametrize('dataset', ['classification'], indirect=True)
def test_the_pipeline_is_still_there(dataset):
    assert type(dataset.pipeline.transforms[-1]).__name__ == 'PackInputs'


BOXES = dict(
    flat=[5, 5, 0, 10],
    negative=[5, 5, -3, 4],
    outside=[70, 5, 10, 10],
    not_a_number=[float('nan'), 5, 10, 10],
    sticks_out=[54, 54, 100, 100],
)


@pytest.mark.parametrize('dataset', ['detection'], indirect=True)
def test_boxes(dataset, tmp_path):
    """mmdet leaves out those without an area in the picture, and cuts off what sticks out."""
    path = tmp_path / 'data/annotations/train.json'
    content = json.loads(path.read_text())
    picture = content['images'][0]['id']
    first = next(a for a in content['annotations'] if a['image_id'] == picture)
    others = [a for a in content['annotations'] if a['image_id'] != picture]
    for kind, box in BOXES.items():
        changed = [dict(first, bbox=box, area=10), *others]
        path.write_text(json.dumps(dict(content, annotations=changed)))
        dataset._fully_initialized = False
        dataset.data_list = []
        dataset.full_init()
        sample = dataset[0]['data_samples']
        corner = [0.0, 135.0, 25.0, 160.0] if sample.flip else [135.0, 135.0, 160.0, 160.0]
        expected = [corner] if kind == 'sticks_out' else []
        assert sample.gt_instances.bboxes.tensor.tolist() == expected, kind

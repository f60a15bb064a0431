# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""With mask_padding an image's features are those of the image alone."""

import copy
import pickle

import pytest
import torch
from conftest import ROOT, TINY_ARCH, randomize_norms_
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmlinglo import LinGlo
from mmlinglo.utils.deploy import build_model

SIZES = [(96, 161), (64, 64), (33, 250)]
STRIDES = (4, 8, 16, 32)


def make(**kwargs):
    torch.manual_seed(0)
    model = LinGlo(**{'arch': TINY_ARCH, 'mask_padding': True, **kwargs})
    model.init_weights()
    for name, parameter in model.named_parameters():
        if 'saliency' in name:
            torch.nn.init.normal_(parameter, std=3.0)  # far from equal weights
    return randomize_norms_(model)


def batch_of(images, value=0.0):
    """The images in the upper left corners of a batch, padded with a value."""
    height, width = (max(image.shape[i] for image in images) for i in (1, 2))
    batch = torch.full((len(images), 3, height, width), value, dtype=images[0].dtype)
    for i, image in enumerate(images):
        batch[i, :, : image.shape[1], : image.shape[2]] = image
    return batch


def inside(maps, index, size):
    """What an image has of the maps of its batch."""
    return [
        m[index : index + 1, :, : -(-size[0] // s), : -(-size[1] // s)]
        for m, s in zip(maps, STRIDES)
    ]


@pytest.mark.parametrize('padded_with', [0.0, 7.0])
@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize(
    'kwargs',
    [
        dict(),
        dict(attention='dot_product'),
        dict(overlap=False),
        dict(pos_encoding='CPE', qkv_bias=False),
        dict(pos_encoding=None),
        dict(norm_cfg=None),
        dict(layout='C-H-H-H'),
        dict(pos_encoding='absolute'),
    ],
    ids=str,
)
@torch.no_grad()
def test_each_image_gets_the_features_that_it_has_alone(kwargs, deploy, padded_with):
    model = make(**kwargs).double().eval()
    images = [torch.randn(3, *size, dtype=torch.float64) for size in SIZES]
    plain = make(**{**kwargs, 'mask_padding': False}).double().eval()
    if deploy and kwargs != dict(norm_cfg=None):
        model.switch_to_deploy()
    maps = model(batch_of(images, padded_with), SIZES)
    for i, (image, size) in enumerate(zip(images, SIZES)):
        for got, alone in zip(inside(maps, i, size), plain(image[None])):
            torch.testing.assert_close(got, alone, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_of_maps_that_are_computed_in_bands():
    """Float32 on the CPU at a size where the feed-forward network works band by band."""
    model, plain = make(arch='b0').eval(), make(arch='b0', mask_padding=False).eval()
    images = [torch.randn(3, 400, 330), torch.randn(3, 416, 600)]
    sizes = [image.shape[1:] for image in images]
    maps = model(batch_of(images), sizes)
    for i, (image, size) in enumerate(zip(images, sizes)):
        for got, alone in zip(inside(maps, i, size), plain(image[None])):
            assert (got - alone).abs().max() < 1e-4 * alone.abs().max()


def test_training_is_on_the_padded_batch():
    """As in the paper."""
    model, plain = (make(mask_padding=mask).train() for mask in (True, False))
    batch = batch_of([torch.randn(3, *size) for size in SIZES])
    for got, expected in zip(model(batch, SIZES), plain(batch)):
        assert torch.equal(got, expected)


@pytest.mark.parametrize('training', [False, True])
def test_without_padding_it_changes_nothing(training):
    model, plain = (make(mask_padding=mask).train(training) for mask in (True, False))
    images = torch.randn(2, 3, 64, 96)
    for got, expected in zip(model(images, [(64, 96)] * 2), plain(images)):
        assert torch.equal(got, expected)


@torch.no_grad()
def test_without_the_option_padding_changes_the_features():
    """Else the tests above show nothing."""
    model = make(mask_padding=False).eval()
    image = torch.randn(3, 64, 64)
    maps = model(batch_of([image, torch.randn(3, 64, 160)]))
    alone = model(image[None])
    for got, expected in zip(inside(maps, 0, (64, 64)), alone):
        assert (got - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize(
    ('sizes', 'message'),
    [
        (None, 'SizedDetDataPreprocessor'),
        ([(64, 64)], r'each image in a batch of shape \(2, 3, 64, 96\)'),
        ([(64, 64), (64, 97)], r'got \[\(64, 64\), \(64, 97\)\]'),
        ([(64, 64), (0, 96)], r'got \[\(64, 64\), \(0, 96\)\]'),
        ([64, 96], r'each image .*, got \[64, 96\]'),
        ([(64, 96, 3)] * 2, r'each image .*, got \[\(64, 96, 3\), '),
    ],
)
def test_wrong_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        make().eval()(torch.rand(2, 3, 64, 96), sizes)


MODELS = dict(
    mmdet=('coco/retinanet_linglo-b0_fpn_1x_coco.py', 'SizedDetDataPreprocessor'),
    mmseg=('ade20k/fpn_linglo-b0_8xb4-40k_ade20k-512x512.py', 'SizedSegDataPreProcessor'),
)


def build(scope):
    config, preprocessor = MODELS[scope]
    cfg = Config.fromfile(ROOT / 'configs' / config)
    cfg.model.data_preprocessor.type = f'mmlinglo.{preprocessor}'
    cfg.model.backbone.update(init_cfg=None, mask_padding=True)
    torch.manual_seed(0)
    return build_model(cfg).eval()


@torch.no_grad()
def test_in_a_detector_batches_do_not_change_the_images():
    from mmdet.structures import DetDataSample

    model = build('mmdet')
    randomize_norms_(model.backbone)
    images = [
        torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((70, 130), (128, 90))
    ]

    def maps_of(batch):
        samples = [DetDataSample(metainfo=dict(img_shape=tuple(x.shape[1:]))) for x in batch]
        data = model.data_preprocessor(dict(inputs=batch, data_samples=samples))
        return model.backbone(data['inputs']), data['inputs'].shape

    maps, shape = maps_of(images)
    assert shape == (2, 3, 128, 160)
    strides = STRIDES[-len(maps) :]
    for i, image in enumerate(images):
        alone, shape = maps_of([image])
        assert shape[2:] != (128, 160)
        for got, expected, stride in zip(maps, alone, strides):
            rows, columns = (-(-pixels // stride) for pixels in image.shape[1:])
            torch.testing.assert_close(
                got[i, :, :rows, :columns], expected[0, :, :rows, :columns], rtol=1e-3, atol=1e-4
            )
    assert len(model.predict(*_batch(model, images))) == 2


def _batch(model, images):
    from mmdet.structures import DetDataSample

    samples = [
        DetDataSample(
            metainfo=dict(
                img_shape=tuple(x.shape[1:]),
                ori_shape=tuple(x.shape[1:]),
                scale_factor=(1.0, 1.0),
                img_id=i,
            )
        )
        for i, x in enumerate(images)
    ]
    data = model.data_preprocessor(dict(inputs=images, data_samples=samples))
    return data['inputs'], data['data_samples']


def test_a_segmentor_learns_and_predicts():
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    model = build('mmseg')
    images = [torch.randint(0, 256, (3, *s), dtype=torch.uint8) for s in ((70, 130), (128, 90))]
    samples = []
    for image in images:
        size = tuple(image.shape[1:])
        sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size))
        sample.gt_sem_seg = PixelData(data=torch.zeros(1, *size, dtype=torch.long))
        samples.append(sample)
    model.train()
    data = model.data_preprocessor(dict(inputs=images, data_samples=samples), True)
    assert data['inputs'].image_sizes == [(70, 130), (128, 90)]
    losses = model(**data, mode='loss')
    model.parse_losses(losses)[0].backward()
    assert all(p.grad is not None for p in model.backbone.parameters())
    model.eval()
    with torch.no_grad():
        (result,) = model.test_step(dict(inputs=images[:1], data_samples=samples[:1]))
    assert result.pred_sem_seg.data.shape[-2:] == (70, 130)


@pytest.mark.parametrize('scope', MODELS)
def test_the_preprocessors_can_be_copied_and_pickled(scope):
    init_default_scope(scope)
    preprocessor = build(scope).data_preprocessor
    for other in (copy.deepcopy(preprocessor), pickle.loads(pickle.dumps(preprocessor))):
        assert type(other) is type(preprocessor)
        assert len(other._forward_hooks) == 1

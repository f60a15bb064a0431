# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""LinGlo from PVTv2: other people's names, the same function where that can be, a close one elsewhere."""

import re
import sys

import cv2
import mmcv
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.logging import MMLogger
from PIL import Image

from mmlinglo import LinGlo
from mmlinglo.utils import CheckpointError
from mmlinglo.utils.pvtv2 import (
    PVTv2Init,
    convert_pvtv2,
    load_pvtv2,
    read_images,
)

timm_pvt = pytest.importorskip('timm.models.pvt_v2')
WIDTHS = dict(embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4))
ARCH = dict(**WIDTHS, depths=(2, 3, 3, 2), mlp_ratio=(2, 2, 2, 2))


def timm_model(**changes):
    """A PVTv2 with weights as after a training: norms that scale and shift, attention that matters."""
    settings = dict(WIDTHS, depths=(2, 2, 2, 2), mlp_ratios=(2, 2, 2, 2), num_classes=0)
    model = timm_pvt.PyramidVisionTransformerV2(**{**settings, **changes}).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if 'norm' in name:
                p.copy_(0.3 * torch.randn_like(p) + (1.0 if name.endswith('weight') else 0.0))
            elif p.dim() > 1:
                p.copy_(torch.randn_like(p) * (1.5 / p[0].numel()) ** 0.5)
            else:
                p.copy_(0.1 * torch.randn_like(p))
    return model


def smooth_images(count=48, size=64):
    return F.interpolate(torch.randn(count, 3, size // 8, size // 8), size=size, mode='bicubic')


def new_linglo(**changes):
    model = LinGlo(**{**dict(arch=ARCH), **changes})
    model.init_weights()
    return model.eval()


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


# Names


def pvt_repository_names(weights):
    """timm's names as the PVT repository has them."""
    renamed = {}
    for name, value in weights.items():
        name = re.sub(r'^patch_embed\.', 'patch_embed1.', name)
        for stage in range(4):
            name = name.replace(f'stages.{stage}.downsample.', f'patch_embed{stage + 1}.')
            name = name.replace(f'stages.{stage}.blocks.', f'block{stage + 1}.')
            name = name.replace(f'stages.{stage}.norm.', f'norm{stage + 1}.')
        renamed[name.replace('.dwconv.', '.dwconv.dwconv.')] = value
    return renamed


def assert_same(weights, expected):
    assert set(weights) == set(expected)
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


def test_names_of_timm_and_of_the_pvt_repository():
    theirs = timm_model(num_classes=5)
    expected = theirs.state_dict()
    renamed = pvt_repository_names(expected)
    assert 'block3.1.mlp.dwconv.dwconv.weight' in renamed
    assert_same(
        timm_pvt.checkpoint_filter_fn(dict(renamed), theirs), expected
    )  # timm's own reading
    for checkpoint in (expected, renamed):
        for wrapped in (checkpoint, dict(state_dict=checkpoint), dict(model=checkpoint)):
            assert_same(load_pvtv2(wrapped, new_linglo().arch, 'x.pth').state_dict(), expected)


def test_names_of_mmpretrains_wrapper():
    """As a training with configs/cifar10/pvtv2-b0_1xb128-30e_cifar10.py has them."""
    timm = pytest.importorskip('timm')
    theirs = timm.create_model('pvt_v2_b0', features_only=True, out_indices=(3,))
    checkpoint = {f'backbone.timm_model.{k}': v for k, v in theirs.state_dict().items()}
    head = dict(weight=torch.randn(10, 256), bias=torch.randn(10))
    checkpoint.update({f'head.fc.{k}': v for k, v in head.items()})
    ours = load_pvtv2(dict(state_dict=checkpoint), new_linglo(arch='b0').arch, 'x.pth')
    assert_same(ours.head.state_dict(), head)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.forward_features(images), theirs.eval()(images)[0])


def test_names_of_mmdet():
    """In a detector; timm's network with these weights computes what mmdet's does."""
    pvt = pytest.importorskip('mmdet.models.backbones.pvt')
    theirs = pvt.PyramidVisionTransformerV2(
        embed_dims=8, num_layers=[2, 2, 2, 2], num_heads=[1, 2, 3, 4], mlp_ratios=[2, 2, 2, 2]
    ).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    weights = {f'backbone.{k}': v for k, v in theirs.state_dict().items()}
    weights['bbox_head.retina_cls.weight'] = torch.zeros(1)
    ours = load_pvtv2(dict(state_dict=weights), new_linglo().arch, 'x.pth')
    assert not ours.head.state_dict()
    images = smooth_images(2)
    with torch.no_grad():
        maps = ours.forward_intermediates(images, intermediates_only=True)
        for ours_map, theirs_map in zip(maps, theirs(images)):
            # The down-sampling norms' epsilons differ: 1e-5 and 1e-6.
            assert relative(ours_map, theirs_map) < 1e-3


def test_no_pvtv2():
    with pytest.raises(CheckpointError, match=r"'x.pth' holds no PVTv2.*conv1.weight"):
        load_pvtv2({'conv1.weight': torch.zeros(1)}, new_linglo().arch, 'x.pth')


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm.models.pvt_v2', None)
    with pytest.raises(CheckpointError, match='PVTv2 needs the package timm: pip install timm'):
        load_pvtv2({}, new_linglo().arch, 'x.pth')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(depths=(2, 2, 2, 3)), r'unexpected: stages.3.blocks.2.norm1.weight'),
        (dict(depths=(2, 2, 1, 2)), r'missing: stages.2.blocks.1.norm1.weight'),
        (
            dict(embed_dims=(16, 32, 48, 64)),
            r'patch_embed.proj.weight \(16, 3, 7, 7\) instead of \(8, 3, 7, 7\)',
        ),
        (dict(linear=True), r'stages.0.blocks.0.attn.sr.weight \(8, 8, 1, 1\) instead of'),
    ],
)
def test_another_size(changes, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pvtv2(timm_model(**changes).state_dict(), new_linglo().arch, 'x.pth')
    assert (
        'depths (2, 3, 3, 2) starts from a PVTv2 of these widths and the depths (2, 2, 2, 2)'
        in (str(caught.value))
    )


@pytest.mark.parametrize('size', ['b0', 'b1', 'b2'])
def test_papers_sizes(size):
    """timm's own sizes are those that LinGlo starts from."""
    timm = pytest.importorskip('timm')
    theirs = timm.create_model(f'pvt_v2_{size}')
    ours = load_pvtv2(theirs.state_dict(), LinGlo.arch_zoo[size], 'x.pth')
    assert ours.head.weight.shape == (1000, dict(b0=256).get(size, 512))


# Values


@pytest.fixture(scope='module')
def converted():
    """PVTv2, the LinGlo made from it, what was said of it, and the batch that was held out of the fits."""
    torch.manual_seed(0)
    theirs, ours = timm_model(), new_linglo()
    batches = smooth_images(96).split(16)
    conversion = convert_pvtv2(theirs, ours, list(batches), steps=100)
    return theirs, ours, conversion, batches[-1]


def test_taken_tensors_are_pvtv2s(converted):
    theirs, ours, (origins, _), _ = converted
    assert list(origins) == list(ours.state_dict())
    pairs = {
        'patch_embed.conv': theirs.patch_embed.proj,
        'patch_embed.norm': theirs.patch_embed.norm,
    }
    for i, stage in enumerate(theirs.stages):
        pairs[f'norm{i}'] = stage.norm
        if i:
            pairs[f'stages.{i}.downsample.norm'] = stage.downsample.norm
        places = (0, 2) if len(ours.stages[i].blocks) == 3 else (0, 1)
        for block, place in zip(stage.blocks, places):
            name = f'stages.{i}.blocks.{place}'
            pairs[f'{name}.norm1'], pairs[f'{name}.norm2'] = block.norm1, block.norm2
            pairs[f'{name}.ffn.fc1'], pairs[f'{name}.ffn.fc2'] = block.mlp.fc1, block.mlp.fc2
    expected = {f'{k}.{n}': v for k, layer in pairs.items() for n, v in layer.state_dict().items()}
    assert {name for name, origin in origins.items() if origin == 'taken'} == set(expected)
    for name, value in expected.items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_encodings_are_pvtv2s_convolutions(converted):
    """Re-parameterised, as evaluated, and in training with batches as in the conversion."""
    theirs, ours, _, images = converted
    pvt_block, block = theirs.stages[0].blocks[0], ours.stages[0].blocks[0]
    dwconv, encoding = pvt_block.mlp.dwconv, block.ffn.pos_encoding
    kernel, bias = encoding.fused_kernel_and_bias()
    torch.testing.assert_close(kernel.float(), dwconv.weight, rtol=0, atol=1e-5)
    torch.testing.assert_close(bias.float(), dwconv.bias, rtol=0, atol=1e-5)
    with torch.no_grad():
        x = ours.patch_embed(images)
        x = x + block.attn(block.norm1(x).flatten(1, 2)).view_as(x)
        hidden = block.ffn.fc1(block.norm2(x)).permute(0, 3, 1, 2)
        expected = dwconv(hidden)
        torch.testing.assert_close(encoding(hidden), expected, rtol=0, atol=1e-4)
        in_training = encoding.train()(hidden)
        encoding.eval()
    assert relative(in_training, expected) < 0.1


def test_additional_blocks_are_the_identity_and_learn(converted):
    _, ours, (origins, _), _ = converted
    for i in (1, 2):
        block = ours.stages[i].blocks[1]
        kinds = {v for k, v in origins.items() if k.startswith(f'stages.{i}.blocks.1.')}
        assert kinds == {'repeated', 'new'}
        x = torch.randn(2, 8, 8, ARCH['embed_dims'][i])
        assert torch.equal(block(x), x)
        block(x).square().sum().backward()
        assert block.attn.proj.weight.grad.abs().max() > 0
        assert block.ffn.fc2.weight.grad.abs().max() > 0


def test_without_attention_the_first_stage_is_exact():
    """What the stem, norms, feed-forward networks and encodings make is PVTv2's to rounding."""
    theirs = timm_model()
    for name, p in theirs.named_parameters():
        if '.attn.proj.' in name:
            torch.nn.init.zeros_(p)
    ours = new_linglo(out_indices=0)
    images = smooth_images(16)
    _, (difference,) = convert_pvtv2(theirs, ours, [images] * 2, steps=0)
    assert difference < 1e-4
    with torch.no_grad():
        expected = theirs.forward_intermediates(images, indices=[0], intermediates_only=True)[0]
        assert relative(ours(images)[0], expected) < 1e-4
        # Batch norm's running variance is the unbiased one.
        assert relative(ours.train()(images)[0], expected) < 2e-3


# In a config


@pytest.fixture
def pictures(tmp_path):
    """Photograph-like pictures of several sizes, in folders."""
    for i, size in enumerate([(90, 60), (64, 64), (50, 120)] * 4):
        noise = np.random.RandomState(i).rand(8, 8, 3).astype('f')
        picture = cv2.resize(noise, size, interpolation=cv2.INTER_CUBIC).clip(0, 1) * 255
        mmcv.imwrite(picture.astype('u1'), str(tmp_path / f'pictures/{i % 2}/{i}.png'))
    return tmp_path / 'pictures'


def test_init_cfg(pictures, tmp_path, capfd):
    theirs = timm_model()
    for name, p in theirs.named_parameters():
        if '.attn.proj.' in name:
            torch.nn.init.zeros_(p)  # then the first stage is exact, whatever the images are
    file = tmp_path / 'pvt.pth'
    torch.save(dict(model=pvt_repository_names(theirs.state_dict())), file)
    settings = dict(type='mmlinglo.PVTv2Init', checkpoint=str(file), images=str(pictures))
    settings.update(num_images=12, steps=10)
    logger = MMLogger.get_instance('start from PVTv2')
    model = LinGlo(arch=ARCH, init_cfg=settings)
    model.init_weights()
    assert model.training
    assert torch.equal(
        model.stages[1].blocks[2].ffn.fc2.weight, theirs.stages[1].blocks[1].mlp.fc2.weight
    )
    images = smooth_images(4)
    with torch.no_grad():
        expected = theirs.forward_intermediates(images, intermediates_only=True)
        ours = model.eval()(images)
    error = relative(ours[0], expected[0])
    assert error < 0.05  # Adam takes steps even where nothing is missing
    text = capfd.readouterr().out + capfd.readouterr().err
    assert re.search(
        rf'PVTv2Init: {file}: \d+ taken, \d+ derived, \d+ repeated, \d+ new of', text
    ), text
    assert logger is MMLogger.get_current_instance()


def test_init_cfg_of_another_size_or_without_pictures(pictures, tmp_path):
    file = tmp_path / 'pvt.pth'
    torch.save(timm_model(depths=(1, 1, 1, 1)).state_dict(), file)
    settings = dict(type='mmlinglo.PVTv2Init', checkpoint=str(file), images=str(pictures))
    model = LinGlo(arch=ARCH, init_cfg=settings)
    with pytest.raises(CheckpointError, match=r'depths \(2, 2, 2, 2\)'):
        model.init_weights()
    torch.save(timm_model().state_dict(), file)
    with pytest.raises(CheckpointError, match='at least 2 batches of images are needed, got 1'):
        PVTv2Init(str(file), str(pictures), num_images=1)(new_linglo())
    with pytest.raises(CheckpointError, match='holds 0 images, at least 2'):
        read_images(pictures / 'none', 8)


def test_init_cfg_with_what_it_cannot_use(tmp_path):
    file = tmp_path / 'pvt.pth'
    torch.save(timm_model().state_dict(), file)
    settings = dict(type='mmlinglo.PVTv2Init', checkpoint=str(file), images=str(tmp_path))
    with pytest.raises(CheckpointError, match=r'holds 0 images, at least 2'):
        LinGlo(arch=ARCH, init_cfg=settings).init_weights()
    for name in 'ab':
        (tmp_path / f'{name}.png').write_bytes(b'damaged')
    with pytest.raises(CheckpointError, match=r"a\.png' is no image that can be read"):
        LinGlo(arch=ARCH, init_cfg=settings).init_weights()
    for name in 'ab':
        mmcv.imwrite(np.zeros((64, 64, 3), 'u1'), str(tmp_path / f'{name}.png'))
    with pytest.raises(CheckpointError, match='drop in_channels from the config'):
        LinGlo(arch=ARCH, in_channels=4, init_cfg=settings).init_weights()


def test_images_are_those_of_classifiers(pictures):
    """As mmpretrain's test pipeline with the values of the ImageNet recipe makes them."""
    found = read_images(pictures, count=5, size=32)
    assert found.shape == (5, 3, 32, 32)
    names = sorted(pictures.rglob('*.png'))
    image = Image.open(names[-1])
    scale = 32 * 8 // 7 / min(image.size)
    image = image.resize([int(scale * side) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((length - 32) // 2 for length in image.size)
    expected = np.asarray(image.crop((left, top, left + 32, top + 32))) / 255.0
    expected = (expected - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    difference = found[-1].permute(1, 2, 0).numpy() - expected
    assert abs(difference).mean() < 0.1


def plain_copy(theirs, ours):
    """All tensors that have a counterpart of the same shape, nothing else."""
    with torch.no_grad():
        ours.patch_embed.conv.load_state_dict(theirs.patch_embed.proj.state_dict())
        ours.patch_embed.norm.load_state_dict(theirs.patch_embed.norm.state_dict())
        for i, (their_stage, stage) in enumerate(zip(theirs.stages, ours.stages)):
            if i:
                stage.downsample.conv.load_state_dict(their_stage.downsample.proj.state_dict())
                stage.downsample.norm.load_state_dict(their_stage.downsample.norm.state_dict())
            getattr(ours, f'norm{i}').load_state_dict(their_stage.norm.state_dict())
            for their_block, block in zip(their_stage.blocks, stage.blocks):
                block.norm1.load_state_dict(their_block.norm1.state_dict())
                block.norm2.load_state_dict(their_block.norm2.state_dict())
                block.ffn.fc1.load_state_dict(their_block.mlp.fc1.state_dict())
                block.ffn.fc2.load_state_dict(their_block.mlp.fc2.state_dict())
                channels = block.attn.key.in_features
                block.attn.key.weight.copy_(their_block.attn.kv.weight[:channels])
                block.attn.value.weight.copy_(their_block.attn.kv.weight[channels:])
                block.attn.proj.load_state_dict(their_block.attn.proj.state_dict())
                block.ffn.pos_encoding.branches[0].conv.weight.copy_(their_block.mlp.dwconv.weight)
    return ours.eval()


def test_function_is_closer_than_without_fit_or_with_a_plain_copy(converted):
    theirs, ours, (_, reported), images = converted
    torch.manual_seed(1)
    copied, started = plain_copy(theirs, new_linglo()), new_linglo()
    convert_pvtv2(theirs, started, [images, images], steps=0)
    with torch.no_grad():
        expected = theirs.forward_intermediates(images, intermediates_only=True)
        differences = {
            name: [relative(out, ref) for out, ref in zip(model(images), expected)]
            for name, model in dict(fitted=ours, started=started, copied=copied).items()
        }
    assert differences['fitted'] == pytest.approx(reported, rel=1e-3)
    for fitted, start, copy in zip(*differences.values()):
        assert fitted < 0.8 * start
        assert fitted < 0.6 * copy


@pytest.mark.parametrize(
    ('changes', 'name'),
    [
        (dict(in_channels=4), 'in_channels'),
        (dict(attention='dot_product'), 'attention'),
        (dict(pos_encoding='absolute'), 'pos_encoding'),
        (dict(layout='C-H-H-H'), 'layout'),
        (dict(overlap=False), 'overlap'),
        (dict(qkv_bias=False), 'qkv_bias'),
        (dict(norm_cfg=None), 'norm_cfg'),
        (dict(frozen_stages=1), 'frozen_stages'),
        (dict(deploy=True), 'deploy'),
    ],
)
def test_variants_that_cannot(changes, name):
    with pytest.raises(CheckpointError, match=f'drop {name} from the config'):
        convert_pvtv2(timm_model(), LinGlo(ARCH, **changes), [torch.zeros(1, 3, 64, 64)] * 2)


def test_one_batch_is_not_enough():
    with pytest.raises(CheckpointError, match='at least 2 batches of images are needed, got 1'):
        convert_pvtv2(timm_model(), LinGlo(ARCH), [torch.zeros(1, 3, 64, 64)])

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Saliency maps against Eq. 2 in float64 NumPy, on what the blocks really received."""

import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_ARCH, randomize_norms_
from mmengine.config import Config, ConfigDict
from torch import nn

from mmlinglo import LinGlo
from mmlinglo.analysis import SaliencyMaps, saliency_maps
from mmlinglo.analysis.saliency import Grid
from mmlinglo.analysis.saliency_figures import plot_saliency
from mmlinglo.models import KeyOnlyAttention
from mmlinglo.utils.deploy import build_model, switch_to_deploy
from mmlinglo.utils.inference import UnreadableError

QUICKSTART = ROOT / 'configs/quickstart'
CLASSIFIER = QUICKSTART / 'linglo-b0_2xb16-8e_shapes.py'
DETECTOR = QUICKSTART / 'retinanet_linglo-b0_fpn_2xb4-3e_shapes.py'
SEGMENTOR = QUICKSTART / 'fpn_linglo-b0_2xb4-360_shapes-160x160.py'
BLOCKS = [(i, j) for i, depth in enumerate(TINY_ARCH['depths']) for j in range(depth)]


def peaked_(model):
    """Weights as after training: batch norms, and saliency vectors that tell positions apart."""
    randomize_norms_(model)
    for module in model.modules():
        if isinstance(module, KeyOnlyAttention):
            nn.init.normal_(module.saliency, std=3.0)
            nn.init.normal_(module.key.weight, std=0.5)
            nn.init.normal_(module.key.bias)
    return model.eval()


def tiny(**kwargs):
    model = LinGlo(**{'arch': TINY_ARCH, **kwargs})
    model.init_weights()
    return peaked_(model)


def expected_weights(attention, x):
    """Eq. 2 for one image's tokens x (1, N, C), as (num_heads, N)."""
    x = x[0].double().numpy()
    w_key, b_key, saliency = (
        p.detach().double().numpy()
        for p in (attention.key.weight, attention.key.bias, attention.saliency)
    )
    num_heads, head_dims = saliency.shape
    weights = []
    for head in range(num_heads):
        columns = slice(head * head_dims, (head + 1) * head_dims)
        logits = (x @ w_key[columns].T + b_key[columns]) @ saliency[head] / np.sqrt(head_dims)
        exponentials = np.exp(logits - logits.max())
        weights.append(exponentials / exponentials.sum())
    return np.stack(weights)


def check_against_formula(model, image, cfg=None):
    """Maps of a model, compared with Eq. 2 on the inputs of its attentions."""
    received, handles = {}, []
    backbone = next(module for module in model.modules() if isinstance(module, LinGlo))
    for i, stage in enumerate(backbone.stages):
        for j, block in enumerate(stage.blocks):
            handles.append(
                block.attn.register_forward_pre_hook(
                    lambda attention, inputs, key=(i, j): received.update(
                        {key: (attention, inputs[0])}
                    )
                )
            )
    maps = saliency_maps(model, image, cfg)
    for handle in handles:
        handle.remove()
    assert maps.weights.keys() == received.keys()
    assert not maps.skipped
    for key, (attention, x) in received.items():
        weights, expected = maps.weights[key], expected_weights(attention, x)
        assert weights.shape[0] == len(attention.saliency)
        assert weights.dtype == torch.float32
        np.testing.assert_allclose(weights.flatten(1).numpy(), expected, rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(weights.sum((1, 2)), 1, atol=1e-5)
        assert weights.shape[1] == 1 or expected.max() * expected.shape[1] > 1.5  # not flat
    return maps


# 64 x 96 pixels are 16 * 24 positions of 8 channels in the first stage, 2 * 3 of 32 in the last:
# the attention has cheaper orders than Eq. 2-4 for some of them, other ones when it is deployed.
@pytest.mark.parametrize('deploy', [False, True])
def test_weights_are_those_of_the_forward_pass(deploy):
    model = tiny()
    if deploy:
        model.switch_to_deploy()
    maps = check_against_formula(model, torch.randn(3, 64, 96))
    assert list(maps.weights) == BLOCKS
    assert [tuple(maps.weights[i, 0].shape) for i in range(4)] == [
        (1, 16, 24), (2, 8, 12), (3, 4, 6), (4, 2, 3)
    ]  # fmt: skip


def test_what_the_softmax_returned_decides():
    """A softmax that is changed changes maps and outputs alike: nothing is computed a second time."""
    model, image = tiny(), torch.randn(3, 64, 64)
    before = saliency_maps(model, image)
    first = model.stages[0].blocks[0].attn
    first.softmax.register_forward_hook(lambda _module, _inputs, weights: weights.flip(-1))
    after = saliency_maps(model, image)
    assert torch.equal(after.weights[0, 0], before.weights[0, 0].flip((1, 2)))
    assert not torch.allclose(after.weights[0, 0], before.weights[0, 0])
    assert not torch.allclose(after.weights[1, 0], before.weights[1, 0])


@pytest.fixture(scope='module')
def picture(tmp_path_factory):
    """A lossless file of 120 x 180 pixels, and its pixels in BGR."""
    rng = np.random.default_rng(0)
    pixels = cv2.resize(rng.integers(0, 256, (12, 18, 3), np.uint8), (180, 120))
    path = tmp_path_factory.mktemp('picture') / 'scene.png'
    cv2.imwrite(str(path), pixels)
    return path, pixels


def tiny_model(config, **more):
    """The quickstart's model of a task on a tiny backbone, and its config."""
    cfg = Config.fromfile(config)
    cfg.model.backbone.update(arch=TINY_ARCH, **more)
    dims = list(TINY_ARCH['embed_dims'])
    if 'neck' in cfg.model and cfg.default_scope != 'mmpretrain':
        indices = cfg.model.backbone.get('out_indices', (0, 1, 2, 3))
        cfg.model.neck.in_channels = [dims[i] for i in indices]
    else:
        cfg.model.head.in_channels = dims[-1]
    return peaked_(build_model(cfg)), cfg


# Size as the network sees it, and whether it is then padded.
@pytest.mark.parametrize(
    ('config', 'size', 'is_padded', 'attribute'),
    [
        (CLASSIFIER, (96, 96), False, '_config'),
        (DETECTOR, (107, 160), True, 'cfg'),
        (SEGMENTOR, (107, 160), False, 'cfg'),
    ],
    ids=['classifier', 'detector', 'segmentor'],
)
@pytest.mark.parametrize('deploy', [False, True])
def test_models_of_the_toolboxes(config, size, is_padded, attribute, deploy, picture):
    path, pixels = picture
    model, cfg = tiny_model(config)
    if deploy:
        switch_to_deploy(model)
    maps = check_against_formula(model, str(path), cfg)
    resized = cv2.resize(pixels, size[::-1])[..., ::-1]
    np.testing.assert_array_equal(maps.picture, resized)
    for block in BLOCKS:
        assert maps.on_picture(*block).shape[1:] == size
    assert (maps.padding_share(0, 0) > 0).item() == is_padded

    setattr(model, attribute, cfg)  # where the toolbox's own loader leaves it
    for image in (path, pixels):
        again = saliency_maps(model, image)
        for block in BLOCKS:
            assert torch.equal(again.weights[block], maps.weights[block])


def test_a_spot_is_found_where_it_is():
    """What the first block sees of a spot lies on it, after resizing and with padding."""
    model, cfg = tiny_model(DETECTOR)
    plain = np.full((120, 180, 3), 90, np.uint8)
    spot = cv2.circle(plain.copy(), (130, 40), 8, (20, 200, 240), -1)
    without, with_spot = (saliency_maps(model, pixels, cfg) for pixels in (plain, spot))
    change = with_spot.on_picture(0, 0)[0] / without.on_picture(0, 0)[0]
    rows, columns = np.nonzero((change / change.median() - 1).abs().numpy() > 1e-3)
    scale = 160 / 180
    assert (columns.min() + columns.max()) / 2 == pytest.approx(130 * scale, abs=4)
    assert (rows.min() + rows.max()) / 2 == pytest.approx(40 * scale, abs=4)


@pytest.mark.parametrize('overlap', [True, False])
def test_grids_are_the_centres_of_the_receptive_fields(overlap):
    arch = {**TINY_ARCH, 'strides': (4, 2, 1, 2)}
    arch.update(embed_dims=(8, 16, 16, 32), num_heads=(1, 2, 2, 4))
    model = tiny(arch=arch, overlap=overlap)
    maps = saliency_maps(model, torch.randn(3, 96, 96))
    image = torch.zeros(1, 3, 96, 96, requires_grad=True)
    x = image
    for i, stage in enumerate(model.stages):
        embed = stage.downsample if i else model.patch_embed
        if embed is not None:
            x = embed.conv(x)
        middle = x.shape[-1] // 2
        (gradient,) = torch.autograd.grad(x[0, :, middle, middle].sum(), image, retain_graph=True)
        pixels = gradient[0].abs().sum((0, 1)).nonzero()
        stride, offset = maps.grids[i]
        assert stride == (4, 8, 8, 16)[i]
        assert offset + stride * middle == (pixels.min() + pixels.max()).item() / 2


def handmade(offset):
    weights = torch.tensor([[[0.1, 0.2, 0.0], [0.3, 0.2, 0.2]]])
    return SaliencyMaps({(0, 0): weights}, np.zeros((4, 7, 3), np.uint8), {0: Grid(4, offset)}, {})


def test_on_picture():
    # Columns are centred on pixels 0, 4, 8, rows on 0 and 4: pixel 2 is as near to 4 as to 0.
    overlapping = handmade(0.0).on_picture(0, 0)[0]
    assert overlapping[0].tolist() == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.2, 0.2, 0.0])
    assert overlapping[:, 0].tolist() == pytest.approx([0.1, 0.1, 0.3, 0.3])
    # On 1.5, 5.5, 9.5: each covers four pixels.
    patches = handmade(1.5).on_picture(0, 0)[0]
    assert patches[0].tolist() == pytest.approx([0.1] * 4 + [0.2] * 3)
    assert patches[:, 0].tolist() == pytest.approx([0.1] * 4)


def test_padding_share():
    # The second row is centred on pixel 4 or 5.5 of 4, the third column on pixel 8 or 9.5 of 7.
    assert handmade(0.0).padding_share(0, 0).tolist() == pytest.approx([0.7])
    assert handmade(1.5).padding_share(0, 0).tolist() == pytest.approx([0.7])
    wide = SaliencyMaps(
        {(0, 0): torch.tensor([[[0.1, 0.2, 0.7]]])},
        np.zeros((4, 9, 3), np.uint8),
        {0: Grid(4, 0.0)},
        {},
    )
    assert wide.padding_share(0, 0).tolist() == [0]


def test_stages_without_weights_are_skipped():
    maps = saliency_maps(tiny(layout='C-C-H-H'), torch.randn(3, 64, 64))
    assert list(maps.weights) == [(2, 0), (3, 0)]
    assert maps.skipped == {i: 'ConvBlock has no attention' for i in (0, 1)}


def test_sheet(tmp_path):
    maps = saliency_maps(tiny(), torch.randn(3, 64, 96))
    sizes = {}
    for name, options in dict(
        all={}, one=dict(stages=[1], blocks=[1]), mean=dict(mean_heads=True)
    ).items():
        plot_saliency(maps, tmp_path / name / 'sheet.png', 'title', **options)
        assert [p.name for p in (tmp_path / name).iterdir()] == ['sheet.png']
        sizes[name] = np.prod(cv2.imread(str(tmp_path / name / 'sheet.png')).shape[:2])
    assert sizes['all'] > sizes['mean'] >= sizes['one']
    with pytest.raises(ValueError, match=r'stages=\[7\].*\(0, 0\), \(1, 0\), \(1, 1\)'):
        plot_saliency(maps, tmp_path / 'no' / 'sheet.png', 'title', stages=[7])
    assert not (tmp_path / 'no').exists()


def test_colours_lie_where_the_weights_do(tmp_path):
    """One bright position among equal ones: the brightest pixels of its tile are around its centre."""
    picture = np.full((64, 96, 3), 100, np.uint8)
    weights = torch.full((1, 16, 24), 1 / 384)
    weights[0, 4:8, 12:16] = 2 / 384
    maps = SaliencyMaps({(0, 0): weights}, picture, {0: Grid(4, 1.5)}, {})
    plot_saliency(maps, tmp_path / 'sheet.png', 'title')
    sheet = cv2.imread(str(tmp_path / 'sheet.png'))
    sheet = sheet[: int(0.82 * len(sheet)), sheet.shape[1] // 2 :]  # right half, without the scale
    low = (sheet > 20).all(2) & (sheet < 60).all(2)  # low weights, on grey
    (rows,), (columns,) = (np.nonzero(low.sum(axis) > 100) for axis in (1, 0))
    top, left, bottom, right = rows.min(), columns.min(), rows.max(), columns.max()
    tile = sheet[top:bottom, left:right].astype(int)
    rows, columns = np.nonzero(tile[..., 2] - tile[..., 0] > 40)  # orange and yellow
    assert rows.mean() / tile.shape[0] == pytest.approx(6 / 16, abs=0.03)
    assert columns.mean() / tile.shape[1] == pytest.approx(14 / 24, abs=0.03)


@pytest.mark.parametrize('channels', [1, 4])
def test_images_of_another_number_of_channels(channels, tmp_path):
    """By the config's own loader; in the sheet as shades of grey."""
    cfg = Config.fromfile(CLASSIFIER)
    cfg.model.backbone.update(arch=TINY_ARCH, in_channels=channels)
    cfg.model.head.in_channels = TINY_ARCH['embed_dims'][-1]
    preprocessor = dict(mean=[100.0] * channels, std=[50.0] * channels, to_rgb=False)
    cfg.data_preprocessor.update(preprocessor)
    flag = 'grayscale' if channels == 1 else 'unchanged'
    cfg.test_dataloader.dataset.pipeline[0].update(color_type=flag, imdecode_backend='cv2')
    model = peaked_(build_model(cfg))
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 90, channels), np.uint8)
    cv2.imwrite(str(tmp_path / 'scene.png'), pixels)
    maps = check_against_formula(model, tmp_path / 'scene.png', cfg)
    assert maps.picture.shape == (96, 96, 3)
    assert (np.ptp(maps.picture, axis=2) == 0).all()
    assert maps.picture.min() == 0
    assert maps.picture.max() == 255
    if channels == 4:
        again = saliency_maps(model, pixels, cfg)
        for block, weights in again.weights.items():
            assert torch.equal(weights, maps.weights[block])
    with pytest.raises(ValueError, match=rf'shape \(H, W, {channels}\).*got \(60, 90, 3\)'):
        saliency_maps(model, np.zeros((60, 90, 3), np.uint8), cfg)
    (tmp_path / 'damaged.png').write_bytes(b'no picture')
    with pytest.raises(UnreadableError, match='damaged'):
        saliency_maps(model, tmp_path / 'damaged.png', cfg)


def test_importing_the_package_needs_no_optional_package():
    code = 'import sys, mmlinglo.analysis as a; a.saliency_maps; print(sorted(sys.modules))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert "'mmlinglo.analysis'" in done.stdout
    for name in ('matplotlib', 'timm'):
        assert f"'{name}'" not in done.stdout


def test_wrong_models(picture):
    image = torch.randn(3, 64, 64)
    with pytest.raises(ValueError, match='Linear with 0'):
        saliency_maps(nn.Linear(1, 1), image)
    with pytest.raises(ValueError, match=r'evaluation mode'):
        saliency_maps(tiny().train(), image)
    with pytest.raises(ValueError, match='DotProductAttention weighs pairs'):
        saliency_maps(tiny(attention='dot_product'), image)
    with pytest.raises(ValueError, match='normalized tensor'):
        saliency_maps(tiny(), picture[0])
    with pytest.raises(ValueError, match='normalized tensor'):
        saliency_maps(tiny_model(CLASSIFIER)[0], picture[0])  # no config


def test_compiled_models():
    """Where torch calls no hooks in what it compiled, there are no maps rather than others."""
    model, image = tiny(), torch.randn(3, 64, 64)
    expected = saliency_maps(model, image)
    model.compile(backend='eager')
    try:
        maps = saliency_maps(model, image)
    except ValueError as error:
        assert 'torch.compile' in str(error)  # noqa: PT017 torch 2.5 does call them
    else:
        for block, weights in expected.weights.items():
            torch.testing.assert_close(maps.weights[block], weights)


def test_sliding_windows(picture):
    model, cfg = tiny_model(SEGMENTOR)
    model.test_cfg = ConfigDict(mode='slide', crop_size=(96, 96), stride=(64, 64))
    with pytest.raises(ValueError, match="mode='whole'"):
        saliency_maps(model, picture[0], cfg)
    # and nothing is left behind
    assert not model.backbone._forward_pre_hooks
    assert not model.backbone.stages[0].blocks[0].attn.softmax._forward_hooks


def test_wrong_pictures(tmp_path, picture):
    model, cfg = tiny_model(CLASSIFIER)
    content = picture[0].read_bytes()
    damaged = dict(text=b'no picture', empty=b'', half=content[: len(content) // 2])
    for name, data in damaged.items():
        path = tmp_path / f'{name}.png'
        path.write_bytes(data)
        with pytest.raises(UnreadableError, match=name):
            saliency_maps(model, path, cfg)
    with pytest.raises(UnreadableError, match='not-there'):
        saliency_maps(model, tmp_path / 'not-there.png', cfg)
    with pytest.raises(ValueError, match=r'\(H, W, 3\), .*got \(20, 30\)'):
        saliency_maps(model, np.zeros((20, 30), np.uint8), cfg)
    with pytest.raises(ValueError, match=r'\(3, H, W\), got \(1, 3, 64, 64\)'):
        saliency_maps(model, torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match='no test_dataloader'):
        saliency_maps(model, picture[0], Config(dict(model={})))

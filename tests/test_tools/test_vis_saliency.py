# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import zlib

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_ARCH, import_tool

from mmlinglo.analysis import saliency_maps
from mmlinglo.analysis.saliency_figures import plot_saliency
from mmlinglo.utils import CheckpointError
from mmlinglo.utils.cli import UsageError, load_config
from mmlinglo.utils.deploy import build_model, switch_to_deploy

TOOL = 'tools/visualization/vis_saliency.py'


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    """Config and checkpoint of the quickstart's classifier with a tiny backbone."""
    folder = tmp_path_factory.mktemp('classifier')
    config, checkpoint = folder / 'tiny.py', folder / 'tiny.pth'
    arch = dict(_delete_=True, **TINY_ARCH)
    config.write_text(
        f"_base_ = '{ROOT}/configs/quickstart/linglo-b0_2xb16-8e_shapes.py'\n"
        f'model = dict(backbone=dict(arch={arch}), head=dict(in_channels=32))\n'
    )
    model = build_model(load_config(str(config)))
    model.init_weights()
    for block in model.backbone.stages[1].blocks:
        torch.nn.init.normal_(block.attn.saliency, std=30)
    torch.save({'state_dict': model.state_dict()}, checkpoint)
    return config, checkpoint


def write_picture(path):
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(zlib.crc32(str(path).encode())).integers(
        0, 256, (60, 90, 3), np.uint8
    )
    assert cv2.imwrite(str(path), pixels)
    return path


def run_here(*args):
    return import_tool(TOOL).main([str(arg) for arg in args])


@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize(
    ('args', 'options'),
    [
        ([], {}),
        (['--stages', 0, 1, '--blocks', 1], dict(stages=[0, 1], blocks=[1])),
        (['--mean-heads', '--stages', 1], dict(stages=[1], mean_heads=True)),
    ],
)
def test_sheet_of_a_checkpoint(classifier, args, options, deploy, tmp_path):
    config, checkpoint = classifier
    image = write_picture(tmp_path / 'scene.png')
    flags = ['--deploy'] if deploy else []
    run_here(
        config, checkpoint, image, '--out-dir', tmp_path, '--device', 'cpu',
        *args, *flags,
    )  # fmt: skip

    cfg = load_config(str(config))
    model = build_model(cfg).eval()
    model.load_state_dict(torch.load(checkpoint)['state_dict'])
    if deploy:
        switch_to_deploy(model)
    plot_saliency(
        saliency_maps(model, image, cfg), tmp_path / 'expected.png', 'scene.png, tiny', **options
    )
    sheet = (tmp_path / 'scene_saliency.png').read_bytes()
    assert sheet == (tmp_path / 'expected.png').read_bytes()


def test_names_of_the_sheets(classifier, tmp_path):
    """Pictures of the same name get sheets of their own, and no sheet replaces a picture."""
    out = tmp_path / 'out'
    names = ['a/scene.png', 'b/scene.png', 'b/scene.jpg', 'out/scene_saliency.png', 'b/...png']
    images = [write_picture(tmp_path / name) for name in names]
    before = [image.read_bytes() for image in images]
    args = ['--out-dir', out, '--stages', 3, '--mean-heads']
    run_here(*classifier, *images, images[0], *args)
    assert [image.read_bytes() for image in images] == before
    assert {path.name for path in out.iterdir()} == {
        'scene_saliency.png',  # the picture
        'scene_saliency_2.png',
        'scene_saliency_3.png',
        'scene_saliency_4.png',
        'scene_saliency_saliency.png',
        '.._saliency.png',
    }
    assert len({path.read_bytes() for path in out.iterdir()}) == 6


def test_pictures_that_cannot_be_read_are_skipped(classifier, tmp_path, capsys):
    images = [write_picture(tmp_path / name) for name in ('a.png', 'b.png', 'c.png')]
    images[0].write_bytes(b'no picture')
    images[1].write_bytes(images[1].read_bytes()[:1000])
    bad, out = [*images[:2], tmp_path / 'missing.png', tmp_path], tmp_path / 'out'
    with pytest.raises(UsageError, match='4 of 5 images could not be read'):
        run_here(*classifier, *bad, images[2], '--out-dir', out)
    lines = capsys.readouterr().err.splitlines()
    for image, line in zip(bad, lines, strict=True):
        assert line.startswith(f'skipped: {str(image)!r}: ')
    assert [path.name for path in out.iterdir()] == ['c_saliency.png']


def test_stages_without_weights_are_named(classifier, tmp_path, capsys):
    config, _ = classifier
    layout = tmp_path / 'layout.py'
    layout.write_text(f"_base_ = '{config}'\nmodel = dict(backbone=dict(layout='C-H-H-H'))\n")
    weights = build_model(load_config(str(layout))).state_dict()
    torch.save({'state_dict': weights}, tmp_path / 'layout.pth')
    image = write_picture(tmp_path / 'scene.png')
    args = ['--out-dir', tmp_path, '--stages', 3]
    run_here(layout, tmp_path / 'layout.pth', image, *args)
    assert 'without stage 0: ConvBlock has no attention' in capsys.readouterr().out


def test_mistakes(classifier, tmp_path):
    config, checkpoint = classifier
    image, out = write_picture(tmp_path / 'scene.png'), tmp_path / 'out'

    def error(*args):
        with pytest.raises((UsageError, CheckpointError, FileNotFoundError)) as stop:
            run_here(*args, '--out-dir', out)
        return str(stop.value)

    assert "config 'no.py' not found" in error('no.py', checkpoint, image)
    assert 'no.pth' in error(config, tmp_path / 'no.pth', image)
    assert "'nonsense'" in error(config, checkpoint, image, '--device', 'nonsense')
    assert 'stages=[4]' in error(config, checkpoint, image, '--stages', 4)
    assert 'blocks=[2]' in error(config, checkpoint, image, '--blocks', 2)
    dot_product = ROOT / 'configs/cifar10/linglo-b0-dot-product_1xb128-30e_cifar10.py'
    weights = build_model(load_config(str(dot_product))).state_dict()
    torch.save({'state_dict': weights}, tmp_path / 'dot_product.pth')
    assert 'DotProductAttention weighs pairs' in error(
        dot_product, tmp_path / 'dot_product.pth', image
    )
    assert not out.exists()

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""LinGlo as one of timm's models: what timm asks of each of its own, and the values of the registered backbone."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, needs_exporter, randomize_norms_

from mmlinglo import LinGlo, get_config
from mmlinglo.models.arch import ARCHS
from mmlinglo.utils.deploy import build_model

timm = pytest.importorskip('timm')
import mmlinglo.timm  # noqa: E402, F401


def create(**settings):
    return randomize_norms_(timm.create_model('linglo_b0', **settings)).eval()


def images(*shape):
    return torch.randn(shape or (2, 3, 64, 96))


def test_names():
    assert timm.list_models('linglo*') == [f'linglo_{arch}' for arch in sorted(ARCHS)]


def test_needs_no_openmmlab():
    """The path that people take who have torch and timm only."""
    blocked = ['mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain']
    code = f"""
import sys
sys.modules.update(dict.fromkeys({blocked}))
import timm, torch, mmlinglo.timm
from mmlinglo.models.network import LinGloNetwork
print(timm.create_model('linglo_b0', num_classes=7)(torch.rand(2, 3, 64, 64)).shape[1])
try:
    from mmlinglo import LinGlo
except ModuleNotFoundError as error:
    print(error)
import mmlinglo.utils.cli
"""
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    remedy = 'mmlinglo needs mmengine, which is not installed: python -m pip install onedl-mmengine'
    assert result.stdout.splitlines()[0] == '7'
    assert result.stdout.splitlines()[1].startswith(remedy)
    assert remedy in result.stderr.splitlines()[-1]


def test_same_maps_as_the_registered_backbone():
    model, x = create(), images()
    backbone = LinGlo('b0').eval()
    names = {f'norm{i}' for i in range(3)}  # of the earlier stages, which a classifier has not
    missing, unexpected = backbone.load_state_dict(model.backbone.state_dict(), strict=False)
    assert {key.split('.')[0] for key in missing} == names
    assert not unexpected
    with torch.no_grad():
        expected = backbone(x)
        last, stages = model.forward_intermediates(x)
        torch.testing.assert_close(last, expected[3])
        torch.testing.assert_close(model.forward_features(x), expected[3])
        for i in range(3):  # fresh output norms: zero mean and unit variance over channels
            normed = torch.nn.functional.layer_norm(
                stages[i].permute(0, 2, 3, 1), stages[i].shape[1:2], eps=1e-6
            )
            torch.testing.assert_close(normed.permute(0, 3, 1, 2), expected[i])
        normed = model.forward_intermediates(x, [3], norm=True, intermediates_only=True)
        torch.testing.assert_close(normed[0], expected[3])
    assert all(stage.is_contiguous() for stage in stages)


@pytest.mark.parametrize(
    'variant',
    [
        dict(layout='C-C-H-H'),
        dict(attention='dot_product'),
        dict(pos_encoding='absolute'),
        dict(pos_encoding='R-CPE', qkv_bias=False),
    ],
    ids=str,
)
def test_variants_are_those_of_the_registered_backbone(variant):
    model, backbone = create(**variant), LinGlo('b0', out_indices=(3,), **variant).eval()
    backbone.load_state_dict(model.backbone.state_dict())
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(x), backbone(x)[0])


@pytest.mark.parametrize(
    'wrong',
    [
        dict(layout='C-H'),
        dict(layout='CCHH'),
        dict(layout='C-C-H-H', pos_encoding='absolute'),
        dict(pos_encoding='RPCPE'),
        dict(attention='nope'),
    ],
    ids=str,
)
def test_wrong_variants_are_refused_as_by_the_registered_backbone(wrong):
    with pytest.raises(ValueError, match='must') as expected:
        LinGlo('b0', **wrong)
    with pytest.raises(ValueError, match=re.escape(str(expected.value))):
        timm.create_model('linglo_b0', **wrong)


def test_checkpoint_of_a_classifier(tmp_path):
    classifier = build_model(get_config('linglo-b0_8xb128_in1k'))
    classifier = randomize_norms_(classifier).eval()
    torch.save(dict(state_dict=classifier.state_dict()), tmp_path / 'classifier.pth')
    x = images()
    path = str(tmp_path / 'classifier.pth')
    overlay = dict(file=path)
    with torch.no_grad():
        expected = classifier(x)
        for settings in (
            dict(checkpoint_path=path),
            dict(pretrained=True, pretrained_cfg_overlay=overlay),
        ):
            model = timm.create_model('linglo_b0', **settings).eval()
            torch.testing.assert_close(model(x), expected)
        model = timm.create_model(
            'linglo_b0', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5
        ).eval()
        assert model(x).shape == (2, 5)
        torch.testing.assert_close(
            model.forward_features(x), classifier.extract_feat(x, 'backbone')[0]
        )


def test_checkpoint_of_a_detector(tmp_path):
    backbone = randomize_norms_(LinGlo('b0')).eval()
    state = {f'backbone.{key}': value for key, value in backbone.state_dict().items()}
    settings = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'c.pth')))
    torch.save(dict(state_dict={**state, 'neck.conv.weight': torch.ones(1)}), tmp_path / 'c.pth')
    model = timm.create_model('linglo_b0', **settings).eval()
    features = timm.create_model('linglo_b0', features_only=True, **settings).eval()
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(x), backbone(x)[3])
        for found, expected in zip(features(x), model.forward_intermediates(x)[1]):
            torch.testing.assert_close(found, expected)
    del state['backbone.stages.2.blocks.0.attn.saliency']
    torch.save(dict(state_dict=state), tmp_path / 'c.pth')
    with pytest.raises(RuntimeError, match=r'stages\.2\.blocks\.0\.attn\.saliency'):
        timm.create_model('linglo_b0', **settings)


@pytest.mark.parametrize('indices', [(0, 1, 2, 3), (1, 2), (-1,), 2])
def test_features_only(indices):
    model, x = create(), images(1, 3, 70, 33)
    count = indices if isinstance(indices, int) else None
    numbers = list(range(4))[-count:] if count else [i % 4 for i in indices]
    out_indices = numbers if count else indices
    features = timm.create_model('linglo_b0', features_only=True, out_indices=out_indices).eval()
    state = {f'model.{key}': value for key, value in model.state_dict().items()}
    kept = features.state_dict()
    features.load_state_dict({key: state[key] for key in kept})
    assert max(numbers) + 1 == len(features.model.backbone.stages)
    assert features.feature_info.channels() == [ARCHS['b0'].embed_dims[i] for i in numbers]
    assert features.feature_info.reduction() == [4 * 2**i for i in numbers]
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices, stop_early=True, intermediates_only=True)
        found = features(x)
        assert len(found) == len(expected) == len(numbers)
        for i, one, other in zip(numbers, found, expected):
            assert one.shape == (
                1,
                ARCHS['b0'].embed_dims[i],
                -(-70 // 2 ** (i + 2)),
                -(-33 // 2 ** (i + 2)),
            )
            torch.testing.assert_close(one, other)
    for name in features.feature_info.module_name():
        features.model.get_submodule(name)


def test_config_names_what_is_there():
    model = create()
    settings = model.pretrained_cfg
    state = model.state_dict()
    assert settings['first_conv'] + '.weight' in state
    assert settings['classifier'] + '.weight' in state
    assert settings['num_classes'] == model.num_classes == 1000
    assert model.get_classifier() is model.get_submodule(settings['classifier'])


def test_classifier_can_be_exchanged():
    model, x = create(num_classes=10), images()
    with torch.no_grad():
        assert model(x).shape == (2, 10)
        pooled = model.forward_features(x).mean((2, 3))
        torch.testing.assert_close(
            model.forward_head(model.forward_features(x), pre_logits=True), pooled
        )
        torch.testing.assert_close(model(x), model.get_classifier()(pooled))
        model.reset_classifier(3)
        assert model(x).shape == (2, 3)
        assert model.num_classes == 3
        assert not model.get_classifier().bias.any()
        model.reset_classifier(0)
        torch.testing.assert_close(model(x), pooled)
        model.reset_classifier(0, '')
        assert model(x).shape == (2, 256, 2, 3)


def test_other_channels():
    assert create(in_chans=5, num_classes=2)(images(1, 5, 64, 64)).shape == (1, 2)


def test_every_parameter_gets_the_same_gradient_with_checkpointing():
    gradients = []
    model, x = create(num_classes=4, drop_path_rate=0.1).train(), images()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for enable in (False, True):
        model.load_state_dict(state)
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        model(x).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(grad is not None for grad in gradients[0].values())
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name])


def test_layer_wise_learning_rates():
    from timm.optim import param_groups_layer_decay

    model = create(num_classes=4)
    rates = {}
    for group in param_groups_layer_decay(model, layer_decay=0.5):
        for param in group['params']:
            rates[id(param)] = group['lr_scale']
    scale = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert scale['head.fc.weight'] == 1.0
    assert scale['backbone.norm3.weight'] == scale['backbone.stages.3.blocks.1.norm1.weight'] == 0.5
    blocks = [
        f'backbone.stages.{i}.blocks.{j}.ffn.fc1.weight'
        for i in range(4)
        for j in range((2, 3, 3, 2)[i])
    ]
    found = [scale['backbone.patch_embed.conv.weight'], *(scale[name] for name in blocks)]
    assert found == sorted(found)
    assert len(set(found)) == len(found)


@needs_exporter
def test_compiles_to_a_graph():
    model, x = create(num_classes=4), images()
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)

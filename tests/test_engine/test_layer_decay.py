# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import re

import pytest
from conftest import ROOT, TINY_ARCH
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmlinglo import LinGlo
from mmlinglo.utils.deploy import build_model

CONSTRUCTOR = 'mmlinglo.LayerDecayOptimWrapperConstructor'
CONFIGS = dict(
    imagenet='configs/imagenet/linglo-b0_8xb128_in1k.py',
    coco='configs/coco/retinanet_linglo-b0_fpn_1x_coco.py',
    ade20k='configs/ade20k/fpn_linglo-b0_8xb4-40k_ade20k-512x512.py',
)
LR, WEIGHT_DECAY, RATE = 0.25, 0.125, 0.5  # powers of two: all products are exact
FIRST_BLOCKS = (1, 3, 6, 9)  # b0: layer 0 is the stem, 1 to 10 its 2 + 3 + 3 + 2 blocks
LAST = 11


def build(task):
    cfg = Config.fromfile(ROOT / CONFIGS[task])
    cfg.model.backbone.init_cfg = None
    return build_model(cfg)


def settings_of(model, constructor=CONSTRUCTOR, **paramwise_cfg):
    """Learning rate and weight decay of each parameter, by name."""
    optimizer = dict(type='AdamW', lr=LR, weight_decay=WEIGHT_DECAY)
    cfg = dict(optimizer=optimizer, constructor=constructor, paramwise_cfg=paramwise_cfg)
    names = {parameter: name for name, parameter in model.named_parameters()}
    settings = {}
    for group in build_optim_wrapper(model, cfg).optimizer.param_groups:
        for parameter in group['params']:
            assert names[parameter] not in settings
            settings[names[parameter]] = (group['lr'], group['weight_decay'])
    return settings


def expected_lr(name):
    """By hand: halved once for every layer between the parameter and the last layer."""
    lr = LR
    for _ in range(LAST - layer_of(name)):
        lr /= 2
    return lr


def layer_of(name):
    if name.startswith('backbone.patch_embed.'):
        return 0
    match = re.match(r'backbone\.stages\.(\d)\.(?:blocks\.(\d)|downsample)\.', name)
    if match:
        return FIRST_BLOCKS[int(match[1])] + int(match[2] or 0)
    assert re.match(r'(backbone\.norm\d|neck|head|bbox_head|decode_head)\.', name), name
    return LAST


@pytest.mark.parametrize('task', CONFIGS)
def test_every_learning_rate_and_weight_decay(task):
    model = build(task)
    settings = settings_of(model, layer_decay_rate=RATE, norm_decay_mult=0.0, bias_decay_mult=0.25)
    assert set(settings) == {name for name, _ in model.named_parameters()}
    norms = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.LayerNorm, _BatchNorm, nn.GroupNorm))
    }
    for name, (lr, weight_decay) in settings.items():
        assert lr == expected_lr(name), name
        module, _, leaf = name.rpartition('.')
        if module in norms:
            assert weight_decay == 0.0, name
        else:
            assert weight_decay == (WEIGHT_DECAY / 4 if leaf == 'bias' else WEIGHT_DECAY), name
    assert {lr for lr, _ in settings.values()} == {LR / 2**i for i in range(LAST + 1)}


def test_classifiers_get_the_rates_of_mmpretrain():
    options = dict(layer_decay_rate=0.65, norm_decay_mult=0.0, bias_decay_mult=0.0)
    theirs = settings_of(
        build('imagenet'), 'mmpretrain.LearningRateDecayOptimWrapperConstructor', **options
    )
    ours = settings_of(build('imagenet'), **options)
    assert ours.keys() == theirs.keys()
    for name, setting in ours.items():
        assert setting == pytest.approx(theirs[name], rel=1e-12), name


def test_custom_keys_multiply_the_rate_of_the_layer():
    name = 'backbone.stages.2.blocks.1.attn.saliency'
    keys = {'saliency': dict(lr_mult=4.0, decay_mult=0.0), 'bbox_head': dict(lr_mult=2.0)}
    settings = settings_of(build('coco'), layer_decay_rate=RATE, custom_keys=keys)
    assert settings[name] == (4 * LR / 2**4, 0.0)  # layer 7 of 11
    assert settings['bbox_head.retina_cls.weight'] == (2 * LR, WEIGHT_DECAY)
    settings = settings_of(build('coco'), layer_decay_rate=RATE, bias_lr_mult=2.0)
    assert settings['backbone.patch_embed.conv.bias'][0] == 2 * LR / 2**LAST


def test_a_bare_backbone_and_frozen_parameters():
    init_default_scope('mmengine')
    backbone = LinGlo(arch=TINY_ARCH, frozen_stages=0)
    settings = settings_of(backbone, layer_decay_rate=RATE)
    assert not any(name.startswith('patch_embed.') for name in settings)
    # 1 + 2 + 1 + 1 blocks: layers 1 to 5, the last one is 6
    assert settings['stages.1.blocks.1.norm1.weight'][0] == LR / 2**3
    assert settings['norm3.weight'][0] == LR


@pytest.mark.parametrize('rate', [None, 0, -0.5, 1.5, '0.9', True])
def test_rates_out_of_range(rate):
    with pytest.raises(ValueError, match=rf'layer_decay_rate.* in \(0, 1\], got {rate!r}'):
        settings_of(LinGlo(arch=TINY_ARCH), layer_decay_rate=rate)


def test_the_rate_must_be_given():
    with pytest.raises(ValueError, match='got None'):
        settings_of(LinGlo(arch=TINY_ARCH))


def test_the_optimizer_must_state_its_rate():
    cfg = dict(
        optimizer=dict(type='AdamW'),
        constructor=CONSTRUCTOR,
        paramwise_cfg=dict(layer_decay_rate=RATE),
    )
    with pytest.raises(ValueError, match=r'optimizer\.lr'):
        build_optim_wrapper(LinGlo(arch=TINY_ARCH), cfg)


def test_models_without_layer_depths():
    with pytest.raises(ValueError, match='this Linear has none'):
        settings_of(nn.Linear(2, 2), layer_decay_rate=RATE)
    cfg = Config.fromfile(ROOT / CONFIGS['imagenet'])
    cfg.model.backbone = dict(type='MobileNetV2')
    with pytest.raises(ValueError, match='this ImageClassifier has none'):
        settings_of(build_model(cfg), layer_decay_rate=RATE)

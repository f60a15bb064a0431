# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Operations counted against sums written out by hand and against two other counters."""

import pytest
import torch
from conftest import ROOT, TINY_ARCH
from mmengine.analysis import FlopAnalyzer
from mmengine.config import Config
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import mmlinglo
from mmlinglo import KeyOnlyAttention, LinGlo
from mmlinglo.analysis.complexity import (
    complexity_rows,
    count_complexity,
    count_forms,
    image_shape,
    padded_shape,
)
from mmlinglo.utils.deploy import build_model

B0_ARCH = dict(
    embed_dims=(32, 64, 160, 256),
    depths=(2, 3, 3, 2),
    num_heads=(1, 2, 5, 8),
    mlp_ratio=(8, 8, 4, 4),
)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def literal_attention(n, c):
    """Keys, values and two mixing layers; scores; context. The gate is element-wise."""
    return 4 * n * c**2 + 2 * n * c


def linglo_macs(arch, size, branches):
    """Paper Sec. 3.3 with one image; sides are multiples of 32. One branch is the deployed form."""
    total, before = 0, 3
    for i, c in enumerate(arch['embed_dims']):
        n = (size // (4 * 2**i)) ** 2
        total += n * before * c * (7 * 7 if i == 0 else 3 * 3)
        attention = literal_attention(n, c)
        hidden = arch['mlp_ratio'][i] * c
        ffn = 2 * n * c * hidden + branches * 9 * hidden * n
        total += arch['depths'][i] * (attention + ffn)
        before = c
    return total


@pytest.mark.parametrize(
    ('arch', 'size'), [(TINY_ARCH, 64), (TINY_ARCH, 160), (B0_ARCH, 224)], ids=str
)
def test_linglo_against_the_sum_of_its_layers(arch, size):
    """In both forms; with many positions and with few, for which rewritings differ."""
    image = torch.empty(1, 3, size, size)
    deployed = LinGlo(arch=arch, out_indices=(3,), deploy=True).eval()
    assert count_complexity(deployed, image).macs == linglo_macs(arch, size, branches=1)
    # group norms, through which no branch can be fused into another
    group_norm = dict(type='GN', num_groups=1)
    branched = LinGlo(arch=arch, out_indices=(3,), norm_cfg=group_norm).eval()
    assert count_complexity(branched, image).macs == linglo_macs(arch, size, branches=4)


def test_linglo_b0_total():
    """The same sum in numbers: stem and down-sampling, then attention, FFN and RP-CPE of each stage."""
    expected = (
        (14_751_744 + 14_450_688 + 18_063_360 + 18_063_360)
        + 2 * (12_845_056 + 200_704 + 51_380_224 + 7_225_344)
        + 3 * (12_845_056 + 100_352 + 51_380_224 + 3_612_672)
        + 3 * (20_070_400 + 62_720 + 40_140_800 + 1_128_960)
        + 2 * (12_845_056 + 25_088 + 25_690_112 + 451_584)
    )
    model = LinGlo('b0', out_indices=(3,), deploy=True).eval()
    assert count_complexity(model, torch.empty(1, 3, 224, 224)).macs == expected


@pytest.mark.parametrize('batch', [1, 4])
@pytest.mark.parametrize('tokens', [10, 100])
def test_a_count_does_not_depend_on_the_rewriting(batch, tokens):
    """Key-only attention costs 4 N C^2 + 2 N C an image, whatever would be executed."""
    attention = KeyOnlyAttention(embed_dims=8, num_heads=2)
    counted = count_complexity(attention, torch.empty(batch, tokens, 8)).macs
    assert counted == batch * (4 * tokens * 64 + 2 * tokens * 8)


def test_depthwise_convolutions_of_the_deployed_encodings():
    """9 r C N: here r C = 16, 32, 48, 64 and 1, 2, 1, 1 blocks at 8 x 8, 4 x 4, 2 x 2, 1 x 1 positions."""
    model = nn.Sequential(LinGlo(arch=TINY_ARCH).eval())
    model[0].switch_to_deploy()
    found = count_complexity(model, torch.empty(1, 3, 32, 32)).operators['0']['convolution']
    dense = 8 * 8 * 8 * 3 * 49 + 9 * (4 * 4 * 16 * 8 + 2 * 2 * 24 * 16 + 1 * 32 * 24)
    assert found == dense + 9 * (16 * 64 + 2 * 32 * 16 + 48 * 4 + 64 * 1)


def test_dot_product_attention():
    """Q K^T and A V, 2 heads of 5 channels, 7 queries on 9 keys."""
    query, key = torch.empty(3, 2, 7, 5), torch.empty(3, 2, 9, 5)
    complexity = count_complexity(Function(F.scaled_dot_product_attention), query, key, key)
    assert complexity.macs == 3 * 2 * (7 * 9 * 5 + 7 * 9 * 5)


@pytest.mark.parametrize(
    ('module', 'shape', 'macs'),
    [
        (nn.Linear(6, 4), (2, 3, 6), 2 * 3 * 6 * 4),
        (nn.Linear(6, 4, bias=False), (2, 3, 6), 2 * 3 * 6 * 4),
        (nn.Conv2d(6, 4, 3, stride=2, padding=1), (2, 6, 8, 8), 2 * 4 * 4 * 4 * 6 * 9),
        (nn.Conv2d(6, 4, 3, groups=2, padding=1), (2, 6, 8, 8), 2 * 4 * 8 * 8 * 3 * 9),
        (nn.ConvTranspose2d(6, 4, 2, stride=2), (2, 6, 8, 8), 2 * 8 * 8 * 6 * 4 * 4),
        (Function(lambda x: torch.einsum('bnc,bmc->bnm', x, x)), (2, 5, 6), 2 * 5 * 5 * 6),
    ],
    ids=str,
)
def test_products(module, shape, macs):
    assert count_complexity(module, torch.empty(shape)).macs == macs


@pytest.mark.parametrize(
    'module',
    [
        nn.ReLU(inplace=True),
        nn.GELU(),
        nn.Hardswish(inplace=True),
        Function(lambda x: x[:, :1] * x + x.mean((2, 3), keepdim=True)),
        nn.Softmax(dim=1),
        nn.LayerNorm(8),
        nn.GroupNorm(2, 2),
        nn.InstanceNorm2d(2),
        nn.BatchNorm2d(2).eval(),
        nn.BatchNorm2d(2),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(3),
        nn.Upsample(scale_factor=2, mode='bilinear'),
        nn.Upsample(scale_factor=2, mode='nearest'),
        nn.ZeroPad2d(1),
        Function(lambda x: x.transpose(1, 2).reshape(8, 16).clone()),
        Function(lambda x: torch.cat([x, x]).masked_fill(torch.zeros(8) == 0, 1.0)),
    ],
    ids=str,
)
def test_operators_without_products(module):
    assert count_complexity(module, torch.empty(1, 2, 8, 8)).macs == 0


def test_parts_and_shared_modules():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
            self.body_2 = Head()
            self.weight = nn.Parameter(torch.zeros(2, 3))

        def forward(self, x):
            x = self.body(self.body(x))
            return self.body_2.forward(x) @ self.weight  # as the toolboxes call their heads

    complexity = count_complexity(Model(), torch.empty(3, 4))
    macs = {part: sum(found.values()) for part, found in complexity.operators.items()}
    assert macs == dict(body=2 * 3 * 16, body_2=3 * 8, other=3 * 6)
    assert complexity.parameters == dict(body=20, body_2=10, other=6)
    assert (complexity.params, complexity.macs) == (36, sum(macs.values()))


def test_a_layer_of_one_part_that_another_calls_counts_once():
    """As the decoder of DINO calls the regression layers of its head."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = Function(lambda x: self.head['fc'](x))
            self.head = nn.ModuleDict(dict(fc=nn.Linear(4, 2)))

        def forward(self, x):
            return self.decoder(x)

    assert count_complexity(Model(), torch.empty(3, 4)).macs == 3 * 8


@pytest.mark.parametrize(
    ('function', 'message'),
    [
        (lambda x: torch.linalg.qr(x)[0], 'the operator aten.linalg_qr.default cannot be counted'),
        (lambda x: x @ torch.zeros(4), 'the operator aten.mv.default cannot be counted'),
        (lambda x: torch.fft.fft(x).real, 'the operator aten._fft_r2c.default cannot be counted'),
        (lambda x: x if x.sum() > 0 else -x, 'without data: aten._local_scalar_dense'),
        (torch.nonzero, 'aten.nonzero.default'),
    ],
)
def test_what_cannot_be_counted_is_an_error(function, message):
    model = nn.Sequential(nn.Linear(4, 4), Function(function))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        count_complexity(model, torch.empty(4, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_model_stays_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    image = torch.rand(1, 3, 8, 8)
    assert count_complexity(model, image).macs == 4 * 36 * 27
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model(image)) is torch.Tensor


def test_agrees_with_mmengine_on_a_plain_convolutional_network():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()
    image = torch.rand(2, 3, 16, 16)
    theirs = FlopAnalyzer(model, image).by_operator()
    assert count_complexity(model, image).macs == theirs['conv'] + theirs['linear'] > 0


def test_agrees_with_torch_on_real_tensors():
    """torch's counter sees what really runs, and counts two operations a multiply-add."""
    model = LinGlo(arch=TINY_ARCH).eval()
    image = torch.rand(2, 3, 96, 64)
    with mmlinglo.literal(), FlopCounterMode(display=False) as counter:
        model(image)
    assert 2 * count_complexity(model, image).macs == counter.get_total_flops() > 0


@pytest.mark.parametrize('channels', [1, 4])
def test_images_of_another_number_of_channels(channels):
    cfg = Config.fromfile(ROOT / 'configs/imagenet/linglo-b0_8xb128_in1k.py')
    three = count_forms(build_model(cfg).eval(), (64, 64))
    cfg.model.backbone.in_channels = channels
    found = count_forms(build_model(cfg).eval(), (64, 64))
    for form in ('training', 'deployed'):  # the stem: 32 channels, 7 x 7, 16 x 16 positions
        assert found[form].macs - three[form].macs == (channels - 3) * 32 * 49 * 16 * 16


def macs_by_part(complexity):
    return {part: sum(found.values()) for part, found in complexity.operators.items()}


def tiny(config, **neck):
    cfg = Config.fromfile(ROOT / 'configs' / config)
    cfg.model.backbone.arch = TINY_ARCH
    cfg.model.merge(neck)
    return build_model(cfg).eval()


def test_retinanet_part_by_part():
    model = tiny(
        'coco/retinanet_linglo-b0_fpn_1x_coco.py',
        backbone=dict(init_cfg=None),
        neck=dict(in_channels=[16, 24, 32]),
    )
    assert padded_shape(model, (800, 1333)) == (800, 1344)
    parts = macs_by_part(count_forms(model, (64, 64))['deployed'])
    assert list(parts) == ['backbone', 'neck', 'bbox_head', 'other']
    assert parts['other'] == 0
    assert parts['backbone'] == linglo_macs(TINY_ARCH, 64, branches=1)
    # 8 x 8, 4 x 4 and 2 x 2 positions, then two levels of one position
    assert parts['neck'] == (
        256 * (64 * 16 + 16 * 24 + 4 * 32) + (64 + 16 + 4) * 9 * 256**2 + 9 * 256 * (32 + 256)
    )
    positions = 64 + 16 + 4 + 1 + 1
    assert parts['bbox_head'] == positions * 9 * 256 * (8 * 256 + 9 * 80 + 9 * 4)


def test_semantic_fpn_part_by_part():
    model = tiny(
        'ade20k/fpn_linglo-b0_8xb4-40k_ade20k-512x512.py',
        backbone=dict(init_cfg=None),
        neck=dict(in_channels=[8, 16, 24, 32]),
    )
    parts = macs_by_part(count_forms(model, (64, 64))['deployed'])
    assert parts['backbone'] == linglo_macs(TINY_ARCH, 64, branches=1)
    # 3 x 3 convolutions to 128 channels: one at strides 4 and 8, two at 16, three at 32, each
    # after the first of a level at twice the size; classes at stride 4
    convs = 256 * 256 + 64 * 256 + 16 * 256 + 64 * 128 + 4 * 256 + 16 * 128 + 64 * 128
    assert parts['decode_head'] == 9 * 128 * convs + 256 * 128 * 150


def test_forms_and_rows_of_a_classifier():
    model = tiny('imagenet/linglo-b0_8xb128_in1k.py', head=dict(in_channels=32))
    forms = count_forms(model, (64, 64))
    hidden = 16 + 2 * 32 + 48 + 64  # r C of each block
    # of 4 branches (9 weights, 2 of the norm) one stays (9 weights and a bias)
    assert forms['training'].params - forms['deployed'].params == hidden * (4 * 11 - 10)
    rows = complexity_rows(forms)
    head = [row for row in rows if row['part'] == 'head' and row['form'] == 'deployed']
    assert head == [
        dict(form='deployed', part='head', operator='all', params_m=0.033, macs_g=3.2e-5),
        dict(form='deployed', part='head', operator='addmm', macs_g=3.2e-5),
    ]
    for form in ('training', 'deployed'):
        mine = [row for row in rows if row['form'] == form]
        whole = [row for row in mine if row['operator'] == 'all']
        total = next(row for row in whole if row['part'] == 'total')
        assert total['macs_g'] == forms[form].macs / 1e9 > 0
        parts = [row for row in whole if row['part'] != 'total']
        assert sum(row['macs_g'] for row in parts) == pytest.approx(total['macs_g'])
        assert sum(row['params_m'] for row in parts) == pytest.approx(total['params_m'])
        for part in whole:
            of_part = [r for r in mine if r['part'] == part['part'] and r['operator'] != 'all']
            assert sum(row['macs_g'] for row in of_part) == pytest.approx(part['macs_g'])


def test_a_model_without_deployed_form_has_equal_forms():
    cfg = Config.fromfile(ROOT / 'configs/imagenet/linglo-b0_8xb128_in1k.py')
    cfg.model.backbone = dict(type='ResNet', depth=18)
    cfg.model.head.in_channels = 512
    forms = count_forms(build_model(cfg).eval(), (32, 32))
    assert forms['training'] == forms['deployed']
    assert forms['training'].params == 11_689_512  # torchvision's published count


def test_two_stage_detectors_are_counted_for_the_most_regions():
    cfg = Config.fromfile(ROOT / 'configs/coco/mask-rcnn_linglo-b0_fpn_1x_coco.py')
    model = build_model(cfg).eval()
    forms = count_forms(model, (64, 96))
    assert 'forward' not in vars(model)
    positions = sum(h * w for h, w in ((16, 24), (8, 12), (4, 6), (2, 3), (1, 2)))
    rpn = positions * (9 * 256**2 + 256 * (3 + 12))  # 3 anchors a position
    boxes = 1000 * (256 * 49 * 1024 + 1024**2 + 1024 * (81 + 4 * 80))
    upsampling = 14 * 14 * 4 * 256**2  # 2 x 2 kernel, stride 2
    masks = 100 * (4 * 14 * 14 * 9 * 256**2 + upsampling + 28 * 28 * 256 * 80)
    for counted in forms.values():
        parts = macs_by_part(counted)
        assert parts['rpn_head'] == rpn
        assert parts['roi_head'] == boxes + masks
        assert counted.params == sum(counted.parameters.values())
    assert forms['training'].params == sum(p.numel() for p in model.parameters())
    cfg.model.test_cfg.rpn.max_per_img = 10
    fewer = count_forms(build_model(cfg).eval(), (64, 96))['training']
    assert macs_by_part(fewer)['roi_head'] == boxes // 100 + masks


@pytest.mark.parametrize(
    ('config', 'shape'),
    [
        ('imagenet/linglo-b0_8xb128_in1k', (224, 224)),
        ('imagenet/linglo-b1_in1k-pre_8xb64-30e_in1k-384px', (384, 384)),
        ('coco/retinanet_linglo-b0_fpn_1x_coco', (800, 1333)),
        ('ade20k/fpn_linglo-b0_8xb4-40k_ade20k-512x512', (512, 512)),
        ('cifar10/linglo-b0_1xb128-30e_cifar10', (96, 96)),
    ],
)
def test_image_shape(config, shape):
    assert image_shape(Config.fromfile(ROOT / f'configs/{config}.py')) == shape


def test_image_shape_must_be_fixed():
    with pytest.raises(ValueError, match='no fixed size'):
        image_shape(Config(dict(default_scope='mmdet', model=dict())))

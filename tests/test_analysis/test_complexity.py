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

from mmlinglo import KeyOnlyAttention, LinGlo
from mmlinglo.analysis.complexity import (
    Count,
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


def folded_attention(n, c, heads, batch=1):
    """Output; scores and weighted sum; U1 U2, W_K U2, (G * W_V) U12; small vectors."""
    return (
        batch * n * c**2
        + 2 * batch * n * c * heads
        + 2 * c**3
        + batch * c**3
        + (2 + 2 * batch) * c**2
    )


def deployed_attention(n, c, heads):
    """With the products of weights made before: folded where N > C, else the order that spares the keys."""
    small = 2 * n * c * heads + c**2  # scores and weighted sum; W_K
    return small + (n * c**2 + c**3 + c**2 if n > c else 3 * n * c**2)


def linglo_macs(arch, size, branches):
    """Paper Sec. 3.3 with one image; sides are multiples of 32. One branch is the deployed form."""
    total, before = 0, 3
    for i, c in enumerate(arch['embed_dims']):
        n = (size // (4 * 2**i)) ** 2
        total += n * before * c * (7 * 7 if i == 0 else 3 * 3)
        heads = arch['num_heads'][i]
        if branches == 1:
            attention = deployed_attention(n, c, heads)
        elif n > 2 * c:  # 3 B N > 2 (B + 2) C with B = 1
            attention = folded_attention(n, c, heads)
        else:
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
    """With stages that fold their attention and stages that do not, in both forms."""
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
        + 2 * (3_211_264 + 200_704 + 32_768 + 2_048 + 51_380_224 + 7_225_344)
        + 3 * (3_211_264 + 200_704 + 262_144 + 8_192 + 51_380_224 + 3_612_672)
        + 3 * (5_017_600 + 313_600 + 4_096_000 + 51_200 + 40_140_800 + 1_128_960)
        + 2 * (9_633_792 + 200_704 + 65_536 + 25_690_112 + 451_584)
    )
    model = LinGlo('b0', out_indices=(3,), deploy=True).eval()
    assert count_complexity(model, torch.empty(1, 3, 224, 224)).macs == expected


@pytest.mark.parametrize(
    ('batch', 'tokens', 'expected'),
    [
        (1, 10, 4 * 10 * 64 + 2 * 10 * 8),
        (1, 100, 100 * 64 + 2 * 100 * 8 * 2 + 3 * 512 + 4 * 64),
        (2, 10, 2 * (4 * 10 * 64 + 2 * 10 * 8)),
        (
            4,
            10,
            4 * 10 * 64 + 2 * 4 * 10 * 8 * 2 + 6 * 512 + 10 * 64,
        ),  # a batch shares two products
    ],
)
def test_both_orders_of_key_only_attention(batch, tokens, expected):
    attention = KeyOnlyAttention(embed_dims=8, num_heads=2)
    assert count_complexity(attention, torch.empty(batch, tokens, 8)).macs == expected


def test_depthwise_convolutions_of_the_deployed_encodings():
    """9 r C N: here r C = 16, 32, 48, 64 and 1, 2, 1, 1 blocks at 8 x 8, 4 x 4, 2 x 2, 1 x 1 positions."""
    model = LinGlo(arch=TINY_ARCH).eval()
    model.switch_to_deploy()
    complexity = count_complexity(model, torch.empty(1, 3, 32, 32))
    expected = 9 * (16 * 64 + 2 * 32 * 16 + 48 * 4 + 64 * 1)
    assert complexity.by_operator()['grouped_convolution'] == (expected, 0)


def test_dot_product_attention():
    """Q K^T and A V, 2 heads of 5 channels, 7 queries on 9 keys; the softmax has 5 operations an element."""
    query, key = torch.empty(3, 2, 7, 5), torch.empty(3, 2, 9, 5)
    complexity = count_complexity(Function(F.scaled_dot_product_attention), query, key, key)
    assert complexity.macs == 3 * 2 * (7 * 9 * 5 + 7 * 9 * 5)
    assert complexity.by_operator()['safe_softmax'] == (0, 5 * 3 * 2 * 7 * 9)


@pytest.mark.parametrize(
    ('module', 'shape', 'macs'),
    [
        (nn.Linear(6, 4), (2, 3, 6), 2 * 3 * 6 * 4),
        (nn.Linear(6, 4, bias=False), (2, 3, 6), 2 * 3 * 6 * 4),
        (nn.Conv2d(6, 4, 3, stride=2, padding=1), (2, 6, 8, 8), 2 * 4 * 4 * 4 * 6 * 9),
        (nn.Conv2d(6, 4, 3, groups=2, padding=1), (2, 6, 8, 8), 2 * 4 * 8 * 8 * 3 * 9),
        (nn.ConvTranspose2d(6, 4, 2, stride=2), (2, 6, 8, 8), 2 * 8 * 8 * 6 * 4 * 4),
        (Function(lambda x: x @ torch.zeros(6)), (5, 6), 5 * 6),
        (Function(lambda x: torch.einsum('bnc,bmc->bnm', x, x)), (2, 5, 6), 2 * 5 * 5 * 6),
    ],
    ids=str,
)
def test_products(module, shape, macs):
    complexity = count_complexity(module, torch.empty(shape))
    assert (complexity.macs, complexity.elementwise) == (macs, 0)


@pytest.mark.parametrize(
    ('module', 'operations'),
    [
        (nn.ReLU(inplace=True), 128),
        (nn.GELU(), 128),
        (Function(lambda x: x + x), 128),
        (Function(lambda x: x * x.mean((2, 3), keepdim=True)), 128 + 128),
        (Function(lambda x: x[:, :1] * x), 128),  # broadcast: an operation an output element
        (nn.Softmax(dim=1), 5 * 128),
        (nn.LayerNorm(8), 5 * 128),
        (nn.LayerNorm(8, elementwise_affine=False), 4 * 128),
        (nn.GroupNorm(2, 2), 5 * 128),
        (nn.InstanceNorm2d(2), 4 * 128),
        (nn.BatchNorm2d(2).eval(), 2 * 128),
        (nn.BatchNorm2d(2, affine=False).eval(), 128),
        (nn.MaxPool2d(3, stride=2, padding=1), 9 * 2 * 4 * 4),
        (nn.AvgPool2d(2), 4 * 2 * 4 * 4),
        (nn.AdaptiveAvgPool2d(1), 128),
        (nn.AdaptiveAvgPool2d(3), 128),
        (nn.Upsample(scale_factor=2, mode='bilinear'), 4 * 4 * 128),
        (nn.Upsample(scale_factor=2, mode='nearest'), 0),
        (nn.ZeroPad2d(1), 0),
        (Function(lambda x: x.transpose(1, 2).reshape(8, 16).clone()), 0),
        (Function(lambda x: torch.cat([x, x]).masked_fill(torch.zeros(8) == 0, 1.0)), 0),
    ],
    ids=str,
)
def test_other_operations(module, operations):
    complexity = count_complexity(module, torch.empty(1, 2, 8, 8))
    assert (complexity.macs, complexity.elementwise) == (0, operations)


def test_parts_and_shared_modules():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
            self.body_2 = nn.Linear(4, 2)

        def forward(self, x):
            x = self.body(self.body(x))
            return self.body_2.forward(x) + 1  # as the toolboxes call their heads

    complexity = count_complexity(Model(), torch.empty(3, 4))
    body, head, rest = (complexity.parts()[name] for name in ('body', 'body_2', ''))
    assert (body.params, body.macs, body.elementwise) == (20, 2 * 3 * 16, 2 * 12)
    assert (head.params, head.macs, head.elementwise) == (10, 3 * 8, 0)
    assert (rest.params, rest.macs, rest.elementwise) == (0, 0, 6)
    assert complexity.part('body.1').by_operator() == {'relu': Count(0, 24)}
    assert complexity.params == 30


@pytest.mark.parametrize(
    ('function', 'operator'),
    [
        (lambda x: torch.linalg.qr(x)[0], 'aten.linalg_qr.default'),
        (lambda x: x if x.sum() > 0 else -x, 'aten._local_scalar_dense.default'),
        (torch.nonzero, 'aten.nonzero.default'),
    ],
)
def test_what_cannot_be_counted_is_an_error(function, operator):
    model = nn.Sequential(nn.Linear(4, 4), Function(function))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f'the operator {operator} in 1 cannot be counted'):
        count_complexity(model, torch.empty(4, 4))
    assert all('forward' not in vars(module) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_model_stays_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    image = torch.rand(1, 3, 8, 8)
    complexity = count_complexity(model, image)
    assert complexity.by_operator()['batch_norm'] == (0, 5 * 4 * 6 * 6)  # of the batch's statistics
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
    theirs, ours = FlopAnalyzer(model, image).by_operator(), count_complexity(model, image)
    assert ours.macs == theirs['conv'] + theirs['linear'] > 0
    assert ours.by_operator()['batch_norm'].elementwise == theirs['batch_norm'] > 0
    assert ours.by_operator()['mean'].elementwise == theirs['adaptive_avg_pool2d'] > 0


def test_agrees_with_torch_on_real_tensors():
    """torch's counter sees what really runs, and counts two operations a multiply-add."""
    model = LinGlo(arch=TINY_ARCH).eval()
    image = torch.rand(2, 3, 96, 64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    assert 2 * count_complexity(model, image).macs == counter.get_total_flops() > 0


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
    complexity = count_forms(model, (64, 64))['deployed']
    parts = complexity.parts()
    assert list(parts) == ['backbone', 'neck', 'bbox_head']
    assert sum(part.macs for part in parts.values()) == complexity.macs
    assert parts['backbone'].macs == linglo_macs(TINY_ARCH, 64, branches=1)
    # 8 x 8, 4 x 4 and 2 x 2 positions, then two levels of one position
    assert parts['neck'].macs == (
        256 * (64 * 16 + 16 * 24 + 4 * 32) + (64 + 16 + 4) * 9 * 256**2 + 9 * 256 * (32 + 256)
    )
    positions = 64 + 16 + 4 + 1 + 1
    assert parts['bbox_head'].macs == positions * 9 * 256 * (8 * 256 + 9 * 80 + 9 * 4)
    assert parts['bbox_head'].elementwise == positions * 8 * 256  # ReLU


def test_semantic_fpn_part_by_part():
    model = tiny(
        'ade20k/fpn_linglo-b0_8xb4-40k_ade20k-512x512.py',
        backbone=dict(init_cfg=None),
        neck=dict(in_channels=[8, 16, 24, 32]),
    )
    parts = count_forms(model, (64, 64))['deployed'].parts()
    assert parts['backbone'].macs == linglo_macs(TINY_ARCH, 64, branches=1)
    # 3 x 3 convolutions to 128 channels: one at strides 4 and 8, two at 16, three at 32, each
    # after the first of a level at twice the size; classes at stride 4
    convs = 256 * 256 + 64 * 256 + 16 * 256 + 64 * 128 + 4 * 256 + 16 * 128 + 64 * 128
    assert parts['decode_head'].macs == 9 * 128 * convs + 256 * 128 * 150


def test_forms_and_rows_of_a_classifier():
    model = tiny('imagenet/linglo-b0_8xb128_in1k.py', head=dict(in_channels=32))
    forms = count_forms(model, (64, 64))
    hidden = 16 + 2 * 32 + 48 + 64  # r C of each block
    # of 4 branches (9 weights, 2 of the norm) one stays (9 weights and a bias)
    assert forms['training'].params - forms['deployed'].params == hidden * (4 * 11 - 10)
    rows = complexity_rows(forms)
    head = [row for row in rows if row['part'] == 'head' and row['form'] == 'deployed']
    assert head == [
        dict(form='deployed', part='head', operator='all', params_m=0.033, macs_g=3.2e-5, elementwise_g=0),
        dict(form='deployed', part='head', operator='addmm', macs_g=3.2e-5, elementwise_g=0),
    ]  # fmt: skip
    for key in ('macs_g', 'elementwise_g'):
        for form in ('training', 'deployed'):
            values = {
                kind: sum(
                    row[key]
                    for row in rows
                    if row['form'] == form
                    and (row['operator'] == 'all') == (kind != 'by operator')
                    and (row['part'] == 'total') == (kind == 'total')
                )
                for kind in ('total', 'by part', 'by operator')
            }
            assert values['by part'] == pytest.approx(values['total']) != 0
            assert values['by operator'] == pytest.approx(values['total'])


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
        assert counted.part('rpn_head').macs == rpn
        assert counted.part('roi_head.bbox_head').macs == boxes
        assert counted.part('roi_head.mask_head').macs == masks
        assert counted.params == sum(counted.parameters.values())
    assert forms['training'].params == sum(p.numel() for p in model.parameters())
    cfg.model.test_cfg.rpn.max_per_img = 10
    fewer = count_forms(build_model(cfg).eval(), (64, 96))['training']
    assert fewer.part('roi_head.bbox_head').macs == boxes // 100


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

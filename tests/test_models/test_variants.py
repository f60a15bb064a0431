# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The ablations' variants of the backbone pass the contract of the default one."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from conftest import TINY_ARCH, randomize_norms_
from torch.nn.modules.batchnorm import _BatchNorm
from torch.testing import assert_close

import mmlinglo
from mmlinglo import LinGlo
from mmlinglo.models import DotProductAttention
from mmlinglo.models.network import AbsolutePositionEmbedding

ISOTROPIC = dict(
    embed_dims=(12,) * 4,
    depths=(1, 2, 1, 1),
    num_heads=(3,) * 4,
    mlp_ratio=(2,) * 4,
    strides=(16, 1, 1, 1),
)
VARIANTS = {
    'default': dict(),
    'dot-product': dict(attention='dot_product'),
    'cpe': dict(pos_encoding='CPE'),
    'r-cpe': dict(pos_encoding='R-CPE'),
    'p-cpe': dict(pos_encoding='P-CPE'),
    'no-encoding': dict(pos_encoding=None),
    'c-c-h-h': dict(layout='C-C-H-H'),
    'c-h-h-h': dict(layout='C-H-H-H'),
    'wo-c': dict(overlap=False, pos_encoding='absolute', img_size=64),
    'wo-ch': dict(arch=ISOTROPIC, overlap=False, pos_encoding='absolute', img_size=64),
}
CONVOLVED = [name for name in VARIANTS if name not in ('no-encoding', 'wo-c', 'wo-ch')]
each_variant = pytest.mark.parametrize('name', VARIANTS)


def build(name, **kwargs):
    model = LinGlo(**{'arch': TINY_ARCH, **VARIANTS[name], **kwargs})
    model.init_weights()
    return model


def run(model, images, literal=False, compiled=False):
    """Maps, gradients of all parameters and the state after a training step."""
    model = copy.deepcopy(model)
    torch.manual_seed(1)  # of the stochastic depth
    with mmlinglo.literal() if literal else nullcontext():
        outs = (torch.compile(model, backend='aot_eager') if compiled else model)(images)
    sum((out * torch.randn_like(out)).sum() for out in outs).backward()
    return outs, {name: p.grad for name, p in model.named_parameters()}, model.state_dict()


@each_variant
@pytest.mark.parametrize('options', [dict(), dict(frozen_stages=2, norm_eval=True)], ids=str)
def test_training(name, options):
    """All that is not frozen gets a gradient; neither rewritings nor checkpointing change anything."""
    model = randomize_norms_(build(name, drop_path_rate=0.3, **options)).double().train()
    checkpointed = build(name, drop_path_rate=0.3, with_cp=True, **options).double().train()
    checkpointed.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 96, 64, dtype=torch.float64)
    outs, gradients, state = run(model, images)
    for key, parameter in model.named_parameters():
        assert (gradients[key] is not None) == parameter.requires_grad, key
        assert gradients[key] is None or gradients[key].isfinite().all(), key
    # As mistaken as rounding in batch norms of the four positions of the last stage.
    assert_close(run(model, images, literal=True), (outs, gradients, state), rtol=1e-7, atol=1e-7)
    assert_close(run(checkpointed, images), (outs, gradients, state))


@pytest.mark.parametrize('norm', ['BN', 'IN'])
@pytest.mark.parametrize('way', ['eager', 'compiled', 'literal'])
def test_checkpointing(norm, way):
    """Also of a forward pass that was compiled, or literal with a backward pass that is not."""
    norm_cfg = dict(type=norm, affine=True, track_running_stats=True)
    model, checkpointed = (
        build('default', norm_cfg=norm_cfg, with_cp=with_cp).train() for with_cp in (False, True)
    )
    checkpointed.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 64, 64)
    expected = run(model, images)
    found = run(checkpointed, images, way == 'literal', way == 'compiled')
    assert_close(found, expected, rtol=1e-3, atol=1e-3)


@each_variant
def test_evaluation(name):
    """Maps have the documented sizes, and the deployed form and the definition have the same maps."""
    model = randomize_norms_(build(name)).double().eval()
    deployed = copy.deepcopy(model)
    deployed.switch_to_deploy()
    assert not any(isinstance(m, _BatchNorm) for m in deployed.modules())
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, deployed))
    assert after < before if name in CONVOLVED else after == before
    fresh = build(name, deploy=True).double().eval()
    fresh.load_state_dict(deployed.state_dict())
    strides = (16,) * 4 if name == 'wo-ch' else (4, 8, 16, 32)
    for size in ((32, 32), (97, 65), (33, 130)):
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            maps = model(images)
            for other in (deployed, fresh):
                assert_close(other(images), maps, rtol=1e-9, atol=1e-9)
            with mmlinglo.literal():
                assert_close(model(images), maps, rtol=1e-9, atol=1e-9)
            for each in (model, deployed):
                assert [out.shape for out in each(images[:0])] == [(0, *m.shape[1:]) for m in maps]
        assert [tuple(out.shape) for out in maps] == [
            (2, channels, *(math.ceil(s / stride) for s in size))
            for channels, stride in zip(model.arch['embed_dims'], strides)
        ]


@each_variant
def test_layer_depth(name):
    """Depths grow with the order of execution, from the stem to what follows the backbone."""
    model = build(name)
    depths = [1, 2, 1, 1]
    expected = {'patch_embed': 0, 'norm': 6}
    for stage in range(4):
        first = 1 + sum(depths[:stage])
        expected[f'stages.{stage}.downsample'] = expected[f'stages.{stage}.pos_embed'] = first
        for block in range(depths[stage]):
            expected[f'stages.{stage}.blocks.{block}'] = first + block
    for key, _ in model.named_parameters():
        depth = next(depth for start, depth in expected.items() if key.startswith(start))
        assert model.get_layer_depth(key) == (depth, 7), key
        assert model.get_layer_depth(f'backbone.{key}', 'backbone.') == (depth, 7)
    assert model.get_layer_depth('head.fc.weight', 'backbone.') == (6, 7)


@pytest.mark.parametrize('arch', ['b0', 'b1', 'b2'])
@pytest.mark.parametrize('deploy', [False, True])
def test_convolutional_blocks_have_the_size_of_those_that_they_replace(arch, deploy):
    """Table 5: "almost the same", block by block."""
    with torch.device('meta'):
        hybrid, convolutional = (
            LinGlo(arch, layout=layout, deploy=deploy) for layout in ('H-H-H-H', 'C-C-C-C')
        )
    for stages in zip(hybrid.stages, convolutional.stages):
        sizes = [sum(p.numel() for p in stage.blocks[0].parameters()) for stage in stages]
        assert sizes[1] == pytest.approx(sizes[0], rel=0.03)


def test_dot_product_attention():
    """Against the formula, head by head."""
    attn = DotProductAttention(12, 3)
    torch.nn.init.normal_(attn.qkv.weight)
    attn.double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    query, key, value = attn.qkv(x).split(12, dim=-1)
    heads = []
    for h in range(3):
        q, k, v = (t[..., 4 * h : 4 * h + 4] for t in (query, key, value))
        weights = (q @ k.transpose(1, 2) / math.sqrt(4)).exp()
        heads.append(weights / weights.sum(-1, keepdim=True) @ v)
    assert_close(attn(x), attn.proj(torch.cat(heads, dim=-1)), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match='num_heads=5 must divide embed_dims=32 of its stage'):
        LinGlo(
            arch={**LinGlo.arch_zoo['b0'].to_dict(), 'num_heads': (5, 2, 5, 8)},
            attention='dot_product',
        )
    assert attn.qkv.bias is not None
    assert DotProductAttention(12, 3, qkv_bias=False).qkv.bias is None


def test_key_only_and_dot_product_attention_have_the_same_size():
    with torch.device('meta'):
        sizes = [
            sum(p.numel() for p in LinGlo('b0', attention=a).parameters())
            for a in ('key_only', 'dot_product')
        ]
    saliency = sum(c * n for c, n in zip((32, 64, 160, 256), (2, 3, 3, 2)))
    assert sizes[0] == sizes[1] + saliency


def test_absolute_position_embedding_is_resized_only_for_other_sizes():
    model = build('wo-c').eval()
    embedding = model.stages[1].pos_embed
    assert embedding.pos_embed.shape == (1, 16, 8, 8)
    zeros = torch.zeros(1, 8, 8, 16)
    assert torch.equal(embedding(zeros), embedding.pos_embed.permute(0, 2, 3, 1))
    torch.nn.init.constant_(embedding.pos_embed, 3.0)
    assert_close(embedding(torch.zeros(1, 5, 11, 16)), torch.full((1, 5, 11, 16), 3.0))


def test_absolute_position_embedding_starts_small_and_is_resized_between_pixel_centres():
    embedding = AbsolutePositionEmbedding(64, 16)
    assert embedding.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    ramp = torch.arange(4.0)
    embedding = AbsolutePositionEmbedding(1, 4)
    embedding.pos_embed.data.copy_(ramp.expand(1, 1, 4, 4))
    # Twice as wide: centres lie a quarter and three quarters between those of the grid.
    expected = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0])
    assert_close(embedding(torch.zeros(1, 4, 8, 1))[0, 0, :, 0], expected)
    assert_close(embedding(torch.zeros(1, 8, 4, 1))[0, 5, :, 0], ramp)


def test_patches_do_not_overlap():
    """A pixel's change reaches one position only; with overlapping kernels it reaches several."""
    for overlap, changed in ((False, 1), (True, 4)):
        stem = build('default', overlap=overlap).patch_embed
        x = torch.randn(1, 3, 32, 32)
        y = x.clone()
        y[..., 15, 15] += 1
        difference = (stem(x) - stem(y)).abs().sum(-1) > 1e-6
        assert difference.sum() == changed


@pytest.mark.parametrize(
    ('arch', 'depths'), [('b3', (3, 4, 18, 3)), ('b4', (3, 8, 27, 3)), ('b5', (3, 6, 40, 3))]
)
def test_larger_sizes_follow_pvtv2(arch, depths):
    sizes = LinGlo.arch_zoo[arch]
    assert sizes['depths'] == depths
    assert sizes['embed_dims'] == (64, 128, 320, 512)
    if arch == 'b3':  # the others take longer, and are built in the same way
        with torch.device('meta'):
            outs = LinGlo(arch)(torch.empty(1, 3, 64, 64, device='meta'))
        assert [out.shape[1] for out in outs] == [64, 128, 320, 512]


def test_the_default_has_the_same_weights_as_before_the_variants():
    """Checkpoints of earlier versions load: names of the tensors of the first hybrid block."""
    names = {k for k in copy.deepcopy(build('default')).state_dict() if k.startswith('stages.0.')}
    layers = (
        'attn.key',
        'attn.value',
        'attn.mix',
        'attn.proj',
        'ffn.fc1',
        'ffn.fc2',
        'norm1',
        'norm2',
    )
    expected = {f'{layer}.{end}' for layer in layers for end in ('weight', 'bias')}
    expected.add('attn.saliency')
    for i in range(4):
        branch = f'ffn.pos_encoding.branches.{i}'
        expected |= {f'{branch}.conv.weight', f'{branch}.bn.weight', f'{branch}.bn.bias'}
        expected |= {
            f'{branch}.bn.{end}' for end in ('running_mean', 'running_var', 'num_batches_tracked')
        }
    assert names == {f'stages.0.blocks.0.{name}' for name in expected}

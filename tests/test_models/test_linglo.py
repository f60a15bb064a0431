# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import copy
import inspect
import math
import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_ARCH, randomize_norms_
from reference import linglo_parameters
from torch.nn.modules.batchnorm import _BatchNorm
from torch.testing import assert_close
from torchvision.models.feature_extraction import create_feature_extractor

import mmlinglo
from mmlinglo import LinGlo
from mmlinglo.models.network import LinGloNetwork

STRIDES = (4, 8, 16, 32)


def tiny(**kwargs):
    model = LinGlo(arch=TINY_ARCH, **kwargs)
    model.init_weights()
    return model


@pytest.mark.parametrize('arch', ['b0', 'b1', 'b2'])
@pytest.mark.parametrize(
    ('deploy', 'millions'),
    [(False, dict(b0=3.81, b1=14.14, b2=25.97)), (True, dict(b0=3.60, b1=13.73, b2=25.15))],
)
def test_parameter_counts(arch, deploy, millions):
    with torch.device('meta'):
        model = LinGlo(arch, out_indices=(3,), deploy=deploy)
        head = torch.nn.Linear(model.arch['embed_dims'][-1], 1000)
    sizes = {key: model.arch[key] for key in ('embed_dims', 'depths', 'num_heads', 'mlp_ratio')}
    counted = sum(p.numel() for module in (model, head) for p in module.parameters())
    assert counted == linglo_parameters(**sizes, num_classes=1000, deploy=deploy)
    assert counted / 1e6 == pytest.approx(millions[arch], rel=5e-3)


@pytest.mark.parametrize(
    'out_indices',
    [(3,), (1, 3), (0,), (-1,), (2, 0), (2, -1), 3, -2, np.int64(3), [np.int64(-1), 1]],
)
@pytest.mark.parametrize('frozen_stages', [-1, 1])
def test_out_indices(out_indices, frozen_stages):
    """Whatever is built gets a gradient, or DistributedDataParallel would wait for it."""
    model = tiny(out_indices=out_indices, frozen_stages=frozen_stages).train()
    outs = model(torch.rand(2, 3, 64, 64))
    assert isinstance(outs, tuple)
    stages = [out_indices] if isinstance(out_indices, (int, np.integer)) else out_indices
    assert [tuple(out.shape) for out in outs] == [
        (2, TINY_ARCH['embed_dims'][i], 64 // STRIDES[i], 64 // STRIDES[i]) for i in stages
    ]
    loss = sum((out * torch.randn_like(out)).sum() for out in outs)
    assert loss.requires_grad == any(p.requires_grad for p in model.parameters())
    if loss.requires_grad:
        loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_frozen_stages():
    """-1 freezes nothing, 0 the stem, k the stem and k stages; also after train() and a step."""
    for frozen_stages in range(-1, 5):
        model = randomize_norms_(tiny(frozen_stages=frozen_stages))
        assert model.train() is model
        expected = ['patch_embed.'] if frozen_stages >= 0 else []
        for i in range(frozen_stages):
            expected += [f'stages.{i}.', f'norm{i}.']
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert frozen == {
            name for name, _ in model.named_parameters() if name.startswith(tuple(expected))
        }
        before = copy.deepcopy(model.state_dict())
        model(torch.rand(2, 3, 64, 64))
        changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        assert changed == {
            name
            for name, _ in model.named_buffers()
            if not name.startswith(tuple(expected) or ('nothing',))
        }


def test_norm_eval_keeps_statistics_but_trains_weights():
    model = randomize_norms_(tiny(norm_eval=True)).train()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    assert model.training
    assert norms
    assert not any(norm.training for norm in norms)
    assert all(norm.weight.requires_grad for norm in norms)


def test_drop_path_rates():
    model = LinGlo('b0', drop_path_rate=0.1)
    rates = [block.drop_path.p for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i / 9 for i in range(10)])


def test_training_form_is_not_switched():
    with pytest.raises(RuntimeError, match=r'model\.eval\(\)'):
        tiny().switch_to_deploy()


def test_all_encodings_are_switched_or_none():
    model = tiny().eval()
    model.stages[-1].blocks[-1].ffn.pos_encoding.branches[0].conv.register_forward_hook(print)
    names = list(model.state_dict())
    with pytest.raises(TypeError, match='a hook or another forward'):
        model.switch_to_deploy()
    assert list(model.state_dict()) == names


def test_a_wrong_fusion_is_caught():
    """The comparison of test_variants.py fails when one branch's bias is lost."""
    model = randomize_norms_(tiny()).double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = model(x)
    model.stages[1].blocks[0].ffn.pos_encoding.branches[3].bn.bias.data.zero_()
    model.switch_to_deploy()
    with pytest.raises(AssertionError):
        assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_initialization():
    model = LinGlo('b0')
    model.init_weights()
    block = model.stages[2].blocks[0]
    for weight in (block.attn.key.weight, block.ffn.fc1.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    # fan-out: 3 * 3 * 160 for the down-sampling, 3 * 3 for a depth-wise kernel
    assert model.stages[2].downsample.conv.weight.std().item() == pytest.approx(
        math.sqrt(2 / 1440), rel=0.05
    )
    kernel = block.ffn.pos_encoding.branches[0].conv.weight
    assert kernel.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.05)
    assert block.attn.key.bias.count_nonzero() == 0
    assert block.attn.saliency.std().item() == pytest.approx(0.02, rel=0.3)
    assert torch.equal(block.norm1.weight, torch.ones(160))


def test_other_initializers_apply_on_top():
    model = LinGlo(arch=TINY_ARCH, init_cfg=dict(type='Constant', layer='LayerNorm', val=3.0))
    model.init_weights()
    assert torch.equal(model.patch_embed.norm.weight, torch.full((8,), 3.0))
    assert model.stages[0].blocks[0].attn.key.weight.std() > 0


def test_in_channels_and_norm_cfg():
    model = LinGlo(arch=TINY_ARCH, in_channels=5, norm_cfg=dict(type='BN', momentum=0.03))
    assert model(torch.rand(2, 5, 32, 32))[0].shape == (2, 8, 8, 8)
    momenta = {m.momentum for m in model.modules() if isinstance(m, _BatchNorm)}
    assert momenta == {0.03}


def test_arch_of_another_number_of_stages():
    arch = dict(embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2), mlp_ratio=(2, 2))
    outs = LinGlo(arch=arch, out_indices=(0, 1))(torch.rand(1, 3, 64, 64))
    assert [tuple(out.shape) for out in outs] == [(1, 8, 16, 16), (1, 16, 8, 8)]


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(arch='b9'), r"\['b0', 'b1', 'b2', 'b3', 'b4', 'b5'\] or a dict, got 'b9'"),
        (dict(arch=dict(embed_dims=(8,))), 'depths'),
        (dict(arch={**TINY_ARCH, 'depths': (1, 2)}), 'equally long'),
        (dict(out_indices=(0, 4)), r'\[-4, 3\], got \(0, 4\)'),
        (dict(out_indices=(1, -3)), 'distinct'),
        (dict(out_indices=()), 'at least one'),
        (dict(frozen_stages=5), r'\[-1, 4\], got 5'),
        (dict(drop_path_rate=1.0), 'got 1.0'),
        (dict(attention='query_key'), r"\['key_only', 'dot_product'\], got 'query_key'"),
        (dict(pos_encoding='RPCPE'), r"'RP-CPE', 'absolute', None\], got 'RPCPE'"),
        (dict(layout='C-H'), "'C-C-H-H', got 'C-H'"),
        (dict(layout='CCHH'), "got 'CCHH'"),
        (dict(layout='C-C-H-H', pos_encoding='absolute'), "got 'absolute'"),
        (dict(arch={**TINY_ARCH, 'strides': (4, 2, 1, 2)}), 'stride 1 keeps the channels'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LinGlo(**kwargs)


@pytest.mark.parametrize(
    ('strides', 'out_indices', 'smallest'),
    [((4, 2, 2, 2), (0, 3), 32), ((4, 2, 2, 2), (1,), 8), ((4, 1), (1,), 4), ((4, 2, 2, 2, 2), -1, 64)],
)  # fmt: skip
def test_images_must_not_be_smaller_than_the_largest_stride(strides, out_indices, smallest):
    n = len(strides)
    arch = dict(embed_dims=[8] * n, depths=[1] * n, num_heads=[2] * n, mlp_ratio=[2] * n)
    model = LinGlo(arch={**arch, 'strides': strides}, out_indices=out_indices)
    model(torch.rand(2, 3, smallest, smallest))
    shape = (2, 3, smallest - 1, 64)
    with pytest.raises(ValueError, match=rf'at least {smallest} pixels .*{re.escape(str(shape))}'):
        model(torch.rand(shape))


VARIANTS_BEFORE = torch.load(ROOT / 'tests/data/linglo_before_network_py.pth')


@pytest.mark.parametrize('name', VARIANTS_BEFORE['variants'])
@pytest.mark.parametrize('literal', [False, True])
def test_weights_and_outputs_of_the_code_before_network_py(name, literal):
    """A file that version 0.1.0 wrote: state dicts, training and deployed, maps and statistics."""
    arch, images, variants = (VARIANTS_BEFORE[key] for key in ('arch', 'images', 'variants'))
    variant = variants[name]
    models = {'eval': LinGlo(arch, out_indices=(0, 1), **variant['arguments'])}
    models['eval'].load_state_dict(variant['state_dict'])
    models['train'] = copy.deepcopy(models['eval'])
    models['eval'].eval()
    if 'deployed' in variant:
        models['deployed'] = LinGlo(arch, out_indices=(0, 1), deploy=True, **variant['arguments'])
        models['deployed'].load_state_dict(variant['deployed'])
        models['deployed'].eval()
    for mode, model in models.items():
        with torch.no_grad(), mmlinglo.literal() if literal else nullcontext():
            outs = model(images)
        assert_close(outs, tuple(variant['eval' if mode == 'deployed' else mode]), rtol=1e-4, atol=1e-5)  # fmt: skip
    state = models['train'].state_dict()
    for key, value in variant['running'].items():
        assert_close(state[key], value, rtol=1e-5, atol=1e-6)


def test_fx_traces_the_network():
    model = tiny().eval()
    extractor = create_feature_extractor(model, ['stages.2', 'norm3'])
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad(), mmlinglo.literal():
        maps = extractor(x)
        expected = model(x)[3]
    assert maps['stages.2'].shape == (1, 4, 4, TINY_ARCH['embed_dims'][2])
    assert_close(maps['norm3'].permute(0, 3, 1, 2), expected)


def test_defaults_of_the_plain_network_are_those_of_the_backbone():
    plain, registered = (
        {name: p.default for name, p in inspect.signature(kind).parameters.items()}
        for kind in (LinGloNetwork, LinGlo)
    )
    common = plain.keys() & registered.keys() - {'arch'}
    assert len(common) == 9
    assert {name: plain[name] for name in common} == {name: registered[name] for name in common}
    assert LinGloNetwork().state_dict().keys() == LinGlo().state_dict().keys()


def test_stages_of_stride_1_have_no_down_sampling_layer():
    arch = dict(embed_dims=(16, 16, 32), depths=(1, 1, 1), num_heads=(1, 1, 2), mlp_ratio=(2, 2, 2))
    model = LinGlo({**arch, 'strides': (4, 1, 2)}, out_indices=(0, 1, 2))
    assert [stage.downsample is None for stage in model.stages] == [True, True, False]
    assert [tuple(x.shape[1:]) for x in model.eval()(torch.rand(1, 3, 32, 48))] == [
        (16, 8, 12),
        (16, 8, 12),
        (32, 4, 6),
    ]

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_ARCH, needs_counting
from torch import nn
from torch.testing import assert_close

import mmlinglo
from mmlinglo.analysis.launches import (
    BANDWIDTH,
    GroupedLinGlo,
    build_form,
    count_compiled_kernels,
    count_launches,
    run_backward,
)
from mmlinglo.models.fast import gpu

pytestmark = needs_counting
IMAGES = (2, 3, 64, 64)


def tiny(kind=mmlinglo.LinGlo, **kwargs):
    return kind(TINY_ARCH, **kwargs)


def test_one_convolution_by_hand():
    conv = nn.Conv2d(3, 8, 1)
    found = count_launches(conv.train(), (2, 3, 5, 7))
    images, weights, out = 2 * 3 * 5 * 7, 8 * 3 + 8, 2 * 8 * 5 * 7
    assert found.forward.launches == found.backward.launches == 1
    assert found.forward.bytes_moved == 4 * (images + weights + out)
    # reads the gradient, the images and the kernel, and writes gradients of kernel and bias
    assert found.backward.bytes_moved == 4 * (out + images + 8 * 3 + weights)
    assert found.saved_bytes == 4 * images
    bound = 1e3 * max(found.forward.bytes_moved / BANDWIDTH, 4e-6)
    assert found.forward.lower_bound_ms == pytest.approx(bound)


def test_bytes_bound_large_maps():
    found = count_launches(nn.ReLU(), (64, 64, 512, 512)).forward
    assert found.bytes_moved == 2 * 4 * 64 * 64 * 512 * 512
    assert found.lower_bound_ms == pytest.approx(1e3 * found.bytes_moved / BANDWIDTH)


class Layer(nn.Module):
    """A layer of any function."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.table = torch.ones(5)  # no buffer: it stays on the CPU

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize(
    ('function', 'launches', 'host_copies', 'syncs'),
    [
        (lambda _, x: x.view(-1)[3:].unsqueeze(0), 0, 0, 0),
        (lambda _, x: torch.empty_like(x), 0, 0, 0),
        (lambda _, x: x * 2, 1, 0, 0),
        (lambda _, x: x * torch.tensor(2.0), 1, 0, 0),  # goes along with the launch
        (lambda layer, x: x * layer.table.to(x.device), 2, 1, 0),
        (lambda _, x: x * x.new_tensor([1.0, 2.0, 3.0, 4.0, 5.0]), 2, 1, 0),
        (lambda _, x: x.cpu(), 1, 1, 1),
        (lambda _, x: x * x.sum().item(), 3, 0, 1),
        (lambda _, x: x.nonzero(), 1, 0, 1),
        (lambda _, x: x[x > 0], 2, 0, 1),
    ],
)
def test_copies_and_syncs(function, launches, host_copies, syncs):
    found = count_launches(Layer(function).eval(), (2, 3, 4, 5)).forward
    assert (found.launches, found.host_copies, found.syncs) == (launches, host_copies, syncs)


def test_a_tensor_left_on_the_cpu_is_found():
    with pytest.raises(RuntimeError, match='cpu'):
        count_launches(Layer(lambda layer, x: x * layer.table).eval(), (2, 3, 4, 5))


def test_what_depends_on_values_cannot_be_counted():
    with pytest.raises(ValueError, match='values'):
        count_launches(Layer(lambda _, x: x if x.sum() > 0 else -x).eval(), (2, 3, 4, 5))
    with pytest.raises(ValueError, match='fp8'):
        count_launches(nn.ReLU(), (2, 3, 4, 5), amp='fp8')


@pytest.mark.parametrize('kind', [mmlinglo.LinGlo, GroupedLinGlo])
@pytest.mark.parametrize('kwargs', [{}, dict(fast=False), dict(with_cp=True)], ids=str)
def test_backward_is_that_of_the_engine(kind, kwargs):
    model = tiny(kind, **kwargs).double().train()
    twin, x = copy.deepcopy(model), torch.randn(IMAGES, dtype=torch.float64)
    outputs = twin(x)
    gradients = [torch.randn_like(out) for out in outputs]
    torch.autograd.backward(outputs, gradients)
    found = run_backward(model(x), gradients)
    expected = {name: p.grad for name, p in twin.named_parameters()}
    assert_close({name: found[p] for name, p in model.named_parameters()}, expected)


def test_the_model_is_left_as_it_is():
    model = tiny().train()
    before = copy.deepcopy(model.state_dict())
    count_launches(model, IMAGES, 'fp16')
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert next(model.parameters()).device.type == 'cpu'
    assert not torch.is_autocast_enabled('cuda')


@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_autocast_halves_what_is_moved(mode):
    model = tiny(fast=False).train(mode == 'train')
    full, half = (count_launches(model, (8, 3, 224, 224), amp) for amp in ('none', 'bf16'))
    assert half.forward.operators['to_copy'] > 0 == full.forward.operators['to_copy']
    assert 0.4 < half.forward.bytes_moved / full.forward.bytes_moved < 0.7


def test_attention_is_one_kernel():
    def attend(_, x):
        return F.scaled_dot_product_attention(x, x, x)

    for amp in ('none', 'fp16'):
        model = nn.Sequential(nn.Conv2d(3, 8, 1), Layer(attend)).train()
        found = count_launches(model, (2, 3, 16, 16), amp)
        assert sum('attention' in name for name in found.forward.operators) == 1
        assert sum('attention' in name for name in found.backward.operators) == 1


@pytest.mark.parametrize('amp', ['none', 'fp16'])
def test_the_default_of_b0_waits_for_nothing(amp):
    found = count_launches(build_form('linglo_b0', (224, 224), 'train'), (8, 3, 224, 224), amp)
    both = found.forward + found.backward
    assert both.host_copies == both.syncs == 0
    assert both.launches <= dict(none=900, fp16=1400)[amp]


def test_grouped_branches_need_less():
    def count(form):
        model = build_form('linglo_b0', (224, 224), 'train', form)
        found = count_launches(model, (2, 3, 224, 224))
        return found.forward + found.backward, found.saved_bytes

    (plain, kept), (grouped, grouped_kept) = count('plain'), count('grouped')
    assert grouped.operators['cudnn_batch_norm'] * 4 == plain.operators['cudnn_batch_norm']
    assert grouped.host_copies == grouped.syncs == 0
    assert grouped.launches < 0.87 * plain.launches
    assert grouped.bytes_moved < 0.85 * plain.bytes_moved
    assert grouped_kept < 1.02 * kept


def ratios(plain, ours):
    """Launches, bytes moved and bytes kept of ours, over those of the four branches."""
    both = [found.forward + found.backward for found in (ours, plain)]
    assert both[0].host_copies == both[0].syncs == 0
    launches, moved = (
        getattr(both[0], n) / getattr(both[1], n) for n in ('launches', 'bytes_moved')
    )
    return launches, moved, ours.saved_bytes / plain.saved_bytes


@pytest.mark.parametrize('shape', [(8, 256, 56, 56), (8, 1024, 7, 7), (2, 256, 200, 336)], ids=str)
def test_rewritten_encodings_launch_move_and_keep_less(shape):
    batch_size, channels, *size = shape
    encoding, found = mmlinglo.models.ConditionalPositionalEncoding(channels), []
    for encoding.fast in (False, True):
        # The layer before it is there for the encoding to have a gradient to hand on.
        model = nn.Sequential(nn.Conv2d(3, channels, 1), encoding).train()
        found.append(count_launches(model, (batch_size, 3, *size), 'fp16', channels_last=True))
    launches, moved, kept = ratios(*found)
    assert launches < 0.5
    assert moved < 0.3
    assert kept < 0.4
    kernels = found[1].forward.operators + found[1].backward.operators
    for name in (
        'product_sums',
        'moments',
        'fuse',
        'weight_sums',
        'fuse_backward',
        'input_gradient',
    ):
        assert kernels[name] == 1


@pytest.mark.parametrize('images', [(8, 3, 224, 224), (2, 3, 800, 1344)], ids=str)
def test_the_rewritten_network_launches_moves_and_keeps_less(images):
    models = (build_form('linglo_b0', images[2:], 'train', form) for form in ('plain', 'rewritten'))
    launches, moved, kept = ratios(*(count_launches(model, images, 'fp16') for model in models))
    assert launches < 0.9
    assert moved < 0.45
    assert kept < 0.4


def test_without_triton_tables_are_copied_once(monkeypatch):
    monkeypatch.setattr(gpu, 'HAS_TRITON', False)
    encodings = [mmlinglo.models.ConditionalPositionalEncoding(8) for _ in range(3)]
    for encoding in encodings:
        encoding.fast = True

    def count(number):
        model = nn.Sequential(nn.Conv2d(3, 8, 1), *encodings[:number]).train()
        found = count_launches(model, (2, 3, 16, 16), 'fp16')
        both = found.forward + found.backward
        assert both.syncs == 0
        return both.host_copies

    assert count(1) == count(2) == count(3) <= 5


@pytest.mark.parametrize('amp', ['none', 'fp16'])
def test_the_deployed_form_launches_and_moves_less(amp):
    plain, ours = (
        count_launches(build_form('linglo_b0', (224, 224), 'deploy', form), (8, 3, 224, 224), amp)
        for form in ('plain', 'rewritten')
    )
    assert ours.forward.launches < 0.95 * plain.forward.launches
    assert ours.forward.bytes_moved < 0.97 * plain.forward.bytes_moved


@pytest.mark.parametrize(
    'shape',
    [(8, 3136, 64, 1), (1, 16800, 128, 2), (1, 4200, 160, 5), (8, 196, 160, 5), (1, 1050, 256, 8)],
    ids=str,
)
@pytest.mark.parametrize('amp', ['none', 'fp16'])
def test_rewritten_attention_moves_less(shape, amp):
    batch_size, positions, channels, heads = shape
    attention = mmlinglo.KeyOnlyAttention(channels, heads)
    tokens = nn.Conv2d(3, channels, 1)
    flatten = Layer(lambda _, x: x.flatten(2).transpose(1, 2))
    model = nn.Sequential(tokens, flatten, attention).train()

    def count(fast):
        attention.fast = fast
        found = count_launches(model, (batch_size, 3, 1, positions), amp)
        return found.forward + found.backward

    ours, literal = count(True), count(False)
    assert ours.host_copies == ours.syncs == 0
    assert ours.launches <= 1.2 * literal.launches
    assert ours.bytes_moved <= literal.bytes_moved


def test_deployed_is_one_convolution():
    plain, deployed = (
        count_launches(build_form('linglo_b0', (64, 64), mode), IMAGES).forward
        for mode in ('eval', 'deploy')
    )
    assert deployed.operators['convolution'] == 14  # four down-samplings, ten encodings
    assert plain.operators['convolution'] == 44


def test_an_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr(torch, '__version__', '2.5.1')
    with pytest.raises(ValueError, match=r'needs PyTorch 2\.10 or newer, got 2\.5\.1'):
        count_launches(nn.ReLU(), IMAGES)


def test_unknown_forms():
    with pytest.raises(ValueError, match='LinGlo only'):
        build_form('pvt_v2_b0', (224, 224), 'train', 'grouped')
    with pytest.raises(ValueError, match='mode'):
        build_form('linglo_b0', (224, 224), 'test')


class _TwoKernels(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return (self.linear(x.exp() + 1).sigmoid() * 2).relu()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile needs g++')
def test_compiled_kernels_by_hand():
    """What is before and after the product is one fused kernel each."""
    assert count_compiled_kernels(_TwoKernels().eval(), (4, 8)) == (2, 1)

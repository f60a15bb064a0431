# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The contract of every rewriting: nothing but speed and memory tells it from its definition."""

import copy
import io
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize
import torch.nn.utils.prune
from conftest import TINY_ARCH, needs_exporter, randomize_norms_
from torch import nn
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import mmlinglo
from mmlinglo import LinGlo
from mmlinglo.models import ConditionalPositionalEncoding, KeyOnlyAttention, fast, network
from mmlinglo.models.fast.grouped import GroupedPositionalEncoding


def attention(**kwargs):
    attn = KeyOnlyAttention(12, 3, **kwargs)
    for parameter in attn.parameters():
        nn.init.normal_(parameter)
    return attn


def encoding(**kwargs):
    return randomize_norms_(ConditionalPositionalEncoding(12, **kwargs))


def grouped(**kwargs):
    return randomize_norms_(GroupedPositionalEncoding(12, **kwargs))


def ffn(**kwargs):
    return randomize_norms_(fast.FFN(6, 12, encoding(**kwargs), None))


class Case(NamedTuple):
    build: object
    shapes: list  # of inputs: small ones, where the definition may run, and larger ones
    parts: list  # layers that do the work
    large: tuple = None  # where only what has no gradients is rewritten in another way, in float32


ENCODING_PARTS = ['branches.0', 'branches.0.conv', 'branches.0.bn']
# For the attention, the order changes at 8 to 16 tokens; for the FFN, in float32 without
# gradients, the work is in bands from 2^21 hidden elements on. Whoever looks at the parts of an
# encoding does not know of its skip connection, nor of how many branches above one it has.
CASES = {
    'attention': Case(
        attention,
        [(1, 1, 12), (2, 5, 12), (1, 9, 12), (2, 40, 12), (5, 40, 12)],
        ['key', 'value', 'mix', 'proj', 'softmax'],
    ),
    'attention without biases': Case(
        lambda: attention(qkv_bias=False), [(2, 5, 12), (3, 40, 12)], ['key', 'value']
    ),
    **{
        name: Case(
            lambda branches=branches, skip=skip: encoding(num_branches=branches, skip=skip),
            [(2, 12, 1, 1), (2, 12, 1, 5), (3, 12, 6, 7)],
            ENCODING_PARTS if name in ('CPE', 'RP-CPE') else [],
        )
        for name, (branches, skip) in network.ENCODINGS.items()
    },
    'grouped': Case(grouped, [(2, 12, 1, 1), (2, 12, 1, 5), (3, 12, 6, 7)], ENCODING_PARTS),
    'grouped P-CPE': Case(lambda: grouped(skip=False), [(2, 12, 1, 5), (3, 12, 6, 7)], []),
    'FFN': Case(
        ffn,
        [(3, 5, 1, 6), (2, 3, 4, 6)],
        ['fc1', 'pos_encoding', 'pos_encoding.branches.1.conv', 'act', 'fc2'],
        (2, 300, 300, 6),
    ),
}
each_case = pytest.mark.parametrize('case', CASES.values(), ids=CASES)
each_part = pytest.mark.parametrize(
    ('case', 'part'),
    [pytest.param(c, part, id=f'{name}-{part}') for name, c in CASES.items() for part in c.parts],
)


def run(module, x, literal=False, grad=True, call=lambda module: module):
    """Output, gradients of all inputs and parameters, and state afterwards."""
    module, x = copy.deepcopy(module), x.clone().requires_grad_(grad)
    with mmlinglo.literal() if literal else torch.set_grad_enabled(grad):
        with torch.set_grad_enabled(grad):
            out = call(module)(x)
    if not grad:
        return out, {}, module.state_dict()
    head = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    head = head.bfloat16().to(out.dtype)  # the same in every precision
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    names, tensors = ['x', *trained], [x, *trained.values()]
    gradients = torch.autograd.grad((out * head).sum(), tensors, allow_unused=True)
    return out, dict(zip(names, gradients)), module.state_dict()


@each_case
@pytest.mark.parametrize('mode', ['train', 'norm_eval', 'eval', 'deploy'])
@pytest.mark.parametrize('grad', [True, False])
def test_values_gradients_and_statistics(case, mode, grad):
    module = case.build().double().train(mode in ('train', 'norm_eval'))
    for child in module.modules():
        if mode == 'norm_eval' and isinstance(child, nn.BatchNorm2d):
            child.eval()
        if mode == 'deploy' and isinstance(child, ConditionalPositionalEncoding):
            child.switch_to_deploy()
    for shape in case.shapes:
        x = torch.randn(shape, dtype=torch.float64) + 1
        assert_close(
            run(module, x, grad=grad), run(module, x, literal=True, grad=grad), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize('kind', [encoding, grouped])
@pytest.mark.parametrize('num_branches', [1, 4])
@pytest.mark.parametrize('mode', ['train', 'norm_eval', 'eval'])
@pytest.mark.parametrize(
    'norm',
    [
        dict(affine=False),
        dict(momentum=None),
        dict(momentum=0.3, eps=0.1),
        dict(track_running_stats=False),
    ],
    ids=str,
)
def test_settings_of_norms(kind, num_branches, mode, norm):
    """In several steps, since some averages depend on their number, and in both layouts."""
    module = kind(num_branches=num_branches, norm_layer=partial(nn.BatchNorm2d, **norm))
    module.double().train(mode != 'eval')
    if mode == 'norm_eval':
        for branch in module.branches:
            branch.bn.eval()
    for step, layout in enumerate([torch.contiguous_format, torch.channels_last] * 2):
        x = torch.randn(3, 12, 5, 4 + step, dtype=torch.float64) + step
        found, expected = (
            run(module, x.to(memory_format=layout), literal=o) for o in (False, True)
        )
        assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert found[0].is_contiguous(memory_format=layout)
        module.load_state_dict(found[2])


@each_case
@pytest.mark.parametrize(
    ('dtype', 'autocast'),
    [
        (torch.float32, False),
        *((dtype, autocast) for dtype in (torch.bfloat16, torch.float16) for autocast in (0, 1)),
    ],
)
@pytest.mark.parametrize('training', [True, False])
def test_precision(case, dtype, autocast, training):
    """Outputs and gradients are about as near to float64 as the definition's.

    Twice its error is allowed, since another order of the same additions is another sample of
    the rounding, and two roundings of the largest number, since some of the definition's are exact
    (measured with 8 seeds: 1.3 in float32, 0.4 in half precision).
    Gradients are summed in each image and rounded before they are summed over images. That shows
    only where images cancel one another, which random gradients do not.
    """
    module = case.build().to(torch.float32 if autocast else dtype).train(training)
    runs = [(case.shapes[-1], True), (case.shapes[-1], False), (case.shapes[1], False)]
    if case.large and dtype == torch.float32 and not training:
        runs.append((case.large, False))
    for shape, grad in runs:
        x = torch.randn(shape).to(dtype) + 1
        truth = run(copy.deepcopy(module).double(), x.double(), literal=True, grad=grad)
        results = []
        for literal in (False, True):
            with torch.autocast('cpu', dtype=dtype, enabled=bool(autocast)):
                results.append(run(module, x, literal=literal, grad=grad))
        assert results[0][0].dtype == dtype
        for key, exact in {'out': truth[0], **truth[1]}.items():
            found, literal = (({'out': out} | grads)[key] for out, grads, _ in results)
            assert found.dtype == literal.dtype
            errors = [(a.double() - exact).square().mean().sqrt() for a in (found, literal)]
            rounding = torch.finfo(dtype).eps * exact.abs().max()
            assert errors[0] <= 2 * (errors[1] + rounding), (key, shape)


def count_products(function, *args):
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops() // 2


def is_rewritten(module, x):
    """Whether other operations run than with all rewritings off."""
    operations = list_operations(copy.deepcopy(module), x)
    with mmlinglo.literal():
        return operations != list_operations(copy.deepcopy(module), x)


def list_operations(module, x):
    operations = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operations.append(str(function))
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        module(x)
    return operations


@each_case
def test_the_switches(case):
    """A rewriting is on by default on a CPU only; an argument and ``literal()`` turn it off."""
    module, x = case.build().train(), torch.randn(case.shapes[-1])
    assert is_rewritten(module, x)
    on_meta, fake = copy.deepcopy(module).to('meta'), x.to('meta')
    assert not is_rewritten(on_meta, fake)
    for child in [*module.modules(), *on_meta.modules()]:
        child.fast = True
    assert is_rewritten(module, x)
    assert is_rewritten(on_meta, fake)
    for child in module.modules():
        child.fast = False
    assert not is_rewritten(module, x)


def test_literal_can_be_nested_and_ends_with_an_error():
    module, x = attention(), torch.randn(2, 40, 12)
    with mmlinglo.literal():
        with mmlinglo.literal():
            pass
        assert count_products(module, x) == 4 * 2 * 40 * 12**2 + 2 * 2 * 40 * 12
    with pytest.raises(KeyError), mmlinglo.literal():
        raise KeyError
    assert is_rewritten(module, x)


@each_part
@pytest.mark.parametrize('kind', ['forward', 'forward_pre', 'full_backward', 'full_backward_pre'])
def test_hooks_are_called(case, part, kind):
    """Once for each pass of their layer, at every size and in each mode."""
    for shape in case.shapes:
        for training in (True, False):
            module = case.build().double().train(training)
            calls = []
            layer = module.get_submodule(part)
            getattr(layer, f'register_{kind}_hook')(lambda *_, calls=calls: calls.append(part))
            if training and torch.Size(shape[:1] + shape[2:]).numel() == 1 and 'bn' in part:
                continue
            x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
            module(x).sum().backward()
            assert len(calls) == 1, (shape, training)


@each_part
@pytest.mark.parametrize('kind', ['forward', 'forward_pre', 'full_backward', 'full_backward_pre'])
def test_global_hooks_are_called(case, part, kind):
    module, backward = case.build().eval(), 'backward' in kind
    layer, calls = module.get_submodule(part), []
    handle = getattr(nn.modules.module, f'register_module_{kind}_hook')(
        lambda called, *_: calls.append(called) if called is layer else None
    )
    try:
        with torch.set_grad_enabled(backward):
            out = module(torch.randn(case.shapes[-1], requires_grad=backward))
        if backward:
            out.sum().backward()
    finally:
        handle.remove()
    assert len(calls) == 1


@each_part
@pytest.mark.parametrize('exchange', ['identity', 'sequence', 'another'])
def test_layers_exchanged_for_plain_ones_are_obeyed(case, part, exchange):
    """In float32 without gradients too, where the rewriting of the FFN runs."""
    tried = 0
    for shape in case.shapes[:2] + case.shapes[2:][-1:]:
        module = case.build().eval()
        layer = module.get_submodule(part)
        other = dict(
            identity=nn.Identity(), sequence=nn.Sequential(layer), another=nn.GELU('tanh')
        )[exchange]
        replace(module, part, other)
        x = torch.randn(shape)
        with torch.no_grad():
            try:
                with mmlinglo.literal():
                    expected = module(x)
            except RuntimeError:  # sizes that do not match
                continue
            tried += 1
            assert_close(module(x), expected)
    assert tried or exchange != 'sequence'


@pytest.mark.parametrize('number', [0, 1])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('kind', [encoding, grouped])
@pytest.mark.parametrize(
    'change',
    ['affine', 'track_running_stats', 'num_batches_tracked', 'momentum', 'eps', 'mode', 'length'],
)
def test_unequal_branches_are_obeyed(number, training, kind, change):
    module = kind(num_branches=4).double().train(training)
    norm = module.branches[number].bn
    if change == 'num_batches_tracked':
        norm.num_batches_tracked = None
    elif change in ('momentum', 'eps'):
        setattr(norm, change, 0.5)
    elif change == 'mode':
        norm.train(not training)
    elif change == 'length':
        module.branches[number].append(nn.Softplus())
    else:
        other = nn.BatchNorm2d(12, **{change: False}, dtype=torch.float64)
        module.branches[number].bn = other.train(training)
    x = torch.randn(3, 12, 6, 7, dtype=torch.float64)
    assert_close(run(module, x), run(module, x, literal=True), rtol=1e-9, atol=1e-9)


@each_case
def test_forward_mode_differentiation(case):
    module = case.build().double().eval()
    x, direction = (torch.randn(case.shapes[0], dtype=torch.float64) for _ in range(2))
    step = 1e-6
    expected = (module(x + step * direction) - module(x - step * direction)) / (2 * step)
    with torch.no_grad(), forward_ad.dual_level():
        out = module(forward_ad.make_dual(x, direction))
        tangent = forward_ad.unpack_dual(out).tangent
    assert_close(tangent, expected.detach(), rtol=1e-5, atol=1e-6)
    module, x, direction = module.float(), x.float(), direction.float()
    with torch.no_grad(), forward_ad.dual_level():  # where the FFN's rewriting would run
        found = forward_ad.unpack_dual(module(forward_ad.make_dual(x, direction))).tangent
    assert_close(found, tangent.float(), rtol=1e-3, atol=1e-3)


def test_every_weight_of_the_network_can_be_pruned():
    model = LinGlo(TINY_ARCH)
    for layer in [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]:
        torch.nn.utils.prune.l1_unstructured(layer, 'weight', 0.5)
    x = torch.randn(2, 3, 64, 64)
    for _ in range(2):
        sum(out.square().mean() for out in model(x)).backward()
    model.eval()
    with torch.no_grad():
        found = model(x)
        with mmlinglo.literal():
            assert_close(found, model(x))


def test_the_switch_of_an_encoding_within_an_ffn_is_obeyed(monkeypatch):
    module, x = ffn(num_branches=4, skip=True).eval(), torch.randn(2, 3, 4, 6)
    convolutions = []
    forward = nn.Conv2d.forward
    monkeypatch.setattr(
        nn.Conv2d, 'forward', lambda conv, x: convolutions.append(conv) or forward(conv, x)
    )
    with torch.no_grad():
        module(x)
        assert not convolutions
        module.pos_encoding.fast = False
        module(x)
    assert len(convolutions) == 4


@pytest.mark.parametrize('name', ['mix', 'proj'])
def test_attention_with_an_output_layer_without_a_bias(name):
    module = attention()
    setattr(module, name, nn.Linear(12, 12, bias=False))
    x = torch.randn(2, 40, 12)
    with mmlinglo.literal():
        expected = module(x)
    assert_close(module(x), expected)


@pytest.mark.parametrize(
    'conv', [nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=12, bias=False), nn.Identity()]
)
def test_deployment_refuses_exchanged_convolutions(conv):
    module = encoding(num_branches=4, skip=True).eval()
    module.branches[1].conv = conv
    with pytest.raises(TypeError, match='only depth-wise 3x3 convolutions can be fused'):
        module.switch_to_deploy()
    assert not module.deploy
    x = torch.randn(2, 12, 6, 7)
    with mmlinglo.literal():
        expected = module(x)
    assert_close(module(x), expected)


@pytest.mark.parametrize('part', ['conv', 'bn'])
@pytest.mark.parametrize('change', ['forward hook', 'forward', 'pruning'])
def test_deployment_refuses_what_it_would_lose(change, part):
    module = encoding(num_branches=4, skip=True).eval()
    layer = getattr(module.branches[1], part)
    if change == 'forward hook':
        layer.register_forward_hook(lambda *_: None)
    elif change == 'forward':
        layer.forward = lambda x: 2 * x
    else:
        nn.utils.prune.random_unstructured(layer, 'weight', amount=0.5)
    with pytest.raises(TypeError, match='a hook or another forward is attached'):
        module.switch_to_deploy()
    assert not module.deploy
    if change == 'pruning':
        nn.utils.prune.remove(layer, 'weight')
        x = torch.randn(2, 12, 6, 7)
        expected = module(x)
        module.switch_to_deploy()
        assert_close(module(x), expected)


class Scaled(nn.Module):
    """An adapter around a layer, as PEFT libraries put them."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.scale = nn.Parameter(torch.full((), 3.0, dtype=torch.float64))

    def forward(self, x):
        return self.scale * self.layer(x)


def replace(module, name, layer):
    parent, _, child = name.rpartition('.')
    setattr(module.get_submodule(parent), child, layer)


each_weighted_part = pytest.mark.parametrize(
    ('case', 'part'),
    [p.values for p in each_part.args[1] if p.values[1].endswith(('key', 'value', 'mix', 'proj', 'conv', 'fc1', 'fc2'))],
    ids=[p.id for p in each_part.args[1] if p.values[1].endswith(('key', 'value', 'mix', 'proj', 'conv', 'fc1', 'fc2'))],
)  # fmt: skip


@each_weighted_part
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize(
    'change', ['adapter', 'pruning', 'weight norm', 'old weight norm', 'instance forward']
)
def test_exchanged_and_changed_layers_are_obeyed(case, part, training, change):
    """In two steps each, with the gradients of what was added."""
    for shape in case.shapes[1:2] + case.shapes[2:][-1:]:
        module = case.build().double().train(training)
        layer = module.get_submodule(part)
        expected = copy.deepcopy(module)
        if change == 'adapter':
            replace(module, part, Scaled(layer))
            twin = expected.get_submodule(part)
            for parameter in twin.parameters():
                parameter.data *= 3
        elif change == 'pruning':
            torch.nn.utils.prune.l1_unstructured(layer, 'weight', 0.5)
            expected.get_submodule(part).weight.data *= layer.weight_mask
        elif change == 'weight norm':
            torch.nn.utils.parametrizations.weight_norm(layer)
        elif change == 'old weight norm':
            with pytest.warns(FutureWarning):
                torch.nn.utils.weight_norm(layer)
        else:
            plain = layer.forward
            layer.forward = lambda x, plain=plain: 3 * plain(x)
            for parameter in expected.get_submodule(part).parameters():
                parameter.data *= 3
        for _ in range(2):
            x = torch.randn(shape, dtype=torch.float64)
            with mmlinglo.literal():
                want = expected(x)
            got = module(x)
            assert_close(got, want, rtol=1e-9, atol=1e-9)
            got.square().sum().backward()
        gradients = [p.grad for p in module.get_submodule(part).parameters()]
        assert all(gradient is not None for gradient in gradients)


@each_case
def test_subclasses_are_obeyed(case):
    module = case.build().eval()
    cls = type(module)

    class Doubled(cls):
        def forward(self, x):
            return 2 * super().forward(x)

    x = torch.randn(case.shapes[-1])
    with torch.no_grad():
        expected = module(x)
        module.__class__ = Doubled
        assert_close(module(x), 2 * expected, rtol=1e-3, atol=1e-3)
    if cls is ConditionalPositionalEncoding:
        whole = randomize_norms_(fast.FFN(6, 12, module, None)).eval()
        tokens = torch.randn(1, 5, 7, 6)
        with torch.no_grad():
            hidden = 2 * copy.deepcopy(cls.forward(module, whole.fc1(tokens).permute(0, 3, 1, 2)))
            expected = whole.fc2(F.gelu(hidden).permute(0, 2, 3, 1))
            assert_close(whole(tokens), expected, rtol=1e-4, atol=1e-4)


def test_another_activation_is_obeyed():
    module, x = ffn().eval(), torch.randn(2, 5, 7, 6)
    for activation in (nn.GELU('tanh'), nn.ReLU()):
        module.act = activation
        with torch.no_grad(), mmlinglo.literal():
            expected = module(x)
        with torch.no_grad():
            assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('change', [dict(dilation=2, padding=2), dict(padding_mode='circular')])
def test_another_convolution_is_obeyed(change):
    module, x = encoding().eval(), torch.randn(2, 12, 7, 6)
    kwargs = dict(padding=1, groups=12, bias=False, **{}) | change
    module.branches[1].conv = nn.Conv2d(12, 12, 3, **kwargs)
    expected = x + sum(branch.bn(branch.conv(x)) for branch in module.branches)
    assert_close(module(x), expected)


def build_tiny(deploy=False, **kwargs):
    model = LinGlo(arch=TINY_ARCH, **kwargs)
    model.init_weights()
    randomize_norms_(model).eval()
    if deploy:
        model.switch_to_deploy()
    return model


@pytest.mark.parametrize('deploy', [False, True])
def test_dynamic_quantization(deploy):
    model, x = build_tiny(deploy), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        for got, want in zip(quantized(x), expected):
            assert (got - want).abs().max() < 0.2 * want.abs().max()
            assert not torch.equal(got, want)


@pytest.mark.parametrize('deploy', [False, True])
def test_pickle_and_deepcopy(deploy):
    model, x = build_tiny(deploy), torch.rand(1, 3, 64, 64)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert_close(other(x), model(x), rtol=0, atol=0)


def test_deployed_models_can_be_fine_tuned():
    """All parameters get the gradients of the training form's, and changes in place count at once."""
    deployed, x = build_tiny(deploy=True).double(), torch.rand(2, 3, 64, 64, dtype=torch.float64)
    results = []
    for literal in (False, True):
        with mmlinglo.literal() if literal else torch.enable_grad():
            loss = sum(out.square().mean() for out in deployed(x))
        results.append(torch.autograd.grad(loss, list(deployed.parameters())))
    assert_close(*results)
    assert all(gradient.abs().max() > 0 for gradient in results[0])
    with torch.no_grad():
        for parameter in deployed.parameters():
            parameter.data.mul_(1.1)  # as EMA hooks do
        got = deployed(x)
        with mmlinglo.literal():
            assert_close(got, deployed(x))


def test_switching_in_inference_mode():
    model = build_tiny()
    with torch.inference_mode():
        model.switch_to_deploy()
    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    sum(out.sum() for out in model(x)).backward()
    assert x.grad.abs().max() > 0
    assert all(p.grad is not None for p in model.parameters())


@each_case
def test_second_derivatives(case):
    """A gradient penalty, against the definition."""
    module = case.build().double().train()
    for shape in case.shapes[1:]:
        penalties = []
        x = torch.randn(shape, dtype=torch.float64)
        for literal in (False, True):
            leaf = x.clone().requires_grad_()
            with mmlinglo.literal() if literal else torch.enable_grad():
                out = copy.deepcopy(module)(leaf).sin().sum()
            (gradient,) = torch.autograd.grad(out, leaf, create_graph=True)
            penalties.append(torch.autograd.grad(gradient.square().sum(), leaf)[0])
        assert_close(*penalties, rtol=1e-8, atol=1e-8)


@each_case
def test_function_transforms(case):
    module = case.build().double().eval()
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(case.shapes[1], dtype=torch.float64)

    def loss(values):
        return torch.func.functional_call(module, values, (x,)).sin().sum()

    got = torch.func.grad(loss)(parameters)
    expected = torch.autograd.grad(module(x).sin().sum(), list(module.parameters()))
    assert_close(got, dict(zip(parameters, expected)), rtol=1e-9, atol=1e-9)
    module.train()
    if 'running_mean' not in str(module.state_dict().keys()):
        return
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
            norm.num_batches_tracked = None
    got = torch.func.grad(loss)(parameters)
    expected = torch.autograd.grad(module(x).sin().sum(), list(module.parameters()))
    assert_close(got, dict(zip(parameters, expected)), rtol=1e-9, atol=1e-9)


@each_case
def test_compile_and_trace(case):
    """One graph each, of equal values."""
    module, x = case.build().eval(), torch.randn(case.shapes[-1])
    with torch.no_grad():
        expected = module(x)
        compiled = torch.compile(module, backend='eager', fullgraph=True)
        assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
        traced = torch.jit.trace(module, x)
        assert_close(traced(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['attention', 'grouped', 'FFN'])
def test_compile_in_training(name):
    """One graph forward and one backward: outputs, gradients and running statistics."""
    torch._dynamo.reset()
    module = CASES[name].build().double().train()
    x = torch.randn(CASES[name].shapes[-1], dtype=torch.float64)
    call = partial(torch.compile, backend='aot_eager', fullgraph=True)
    assert_close(run(module, x, call=call), run(module, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('dynamic', [None, True])
def test_compile_in_training_for_several_sizes(dynamic):
    """As the images of a detector come; from the second size on, Dynamo has symbolic sizes."""
    torch._dynamo.reset()
    module = CASES['RP-CPE'].build().double().train()
    compiled = torch.compile(module, backend='aot_eager', dynamic=dynamic)
    for size in ((7, 9), (14, 10), (5, 5)):
        x = torch.randn(2, CASES['RP-CPE'].shapes[-1][1], *size, dtype=torch.float64)
        with mmlinglo.literal():
            expected = module(x)
        assert_close(compiled(x), expected, rtol=1e-9, atol=1e-9)


@needs_exporter
@each_case
def test_export_of_free_sizes(case):
    """One program for smaller and for larger inputs, around the thresholds, too."""
    module, shape = case.build().eval(), case.shapes[-1]
    free = [i for i, sizes in enumerate(zip(*case.shapes)) if len(set(sizes)) > 1]
    dynamic = {i: torch.export.Dim.DYNAMIC for i in free}
    program = torch.export.export(module, (torch.randn(shape),), dynamic_shapes=(dynamic,)).module()
    for change in (lambda _: 2, lambda size: size, lambda size: size + 3):
        x = torch.randn([change(size) if i in free else size for i, size in enumerate(shape)])
        assert_close(program(x), module(x), rtol=1e-4, atol=1e-4)


def test_attention_takes_the_cheaper_order():
    """Multiply-adds as the class counts them, at each number of tokens around the change."""
    for batch_size in (1, 2, 3, 5):
        for channels in (4, 12):
            attn, taken = KeyOnlyAttention(channels, 1), []
            for tokens in range(1, 4 * channels):
                literal = 4 * batch_size * tokens * channels**2
                products = min(2 * batch_size, batch_size + 2) * channels**3
                folded = batch_size * tokens * channels**2 + products
                x = torch.randn(batch_size, tokens, channels)
                taken.append('aten.baddbmm.default' in list_operations(attn, x))
                assert taken[-1] == (8 * folded < 5 * literal), (batch_size, channels, tokens)
            assert set(taken) == {True, False}


def test_only_the_input_is_kept_for_the_backward_pass():
    module = ConditionalPositionalEncoding(32).train()
    x = torch.randn(2, 32, 40, 40).to(memory_format=torch.channels_last).requires_grad_()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    assert kept.pop(x.untyped_storage().data_ptr()) == 4 * x.numel()
    assert sum(kept.values()) < 0.5 * 4 * x.numel()  # kernels and statistics, no maps


def test_gradients_do_not_share_memory():
    """Otherwise an operation in place, such as clipping, would reach one of them several times."""
    module = encoding().train()
    module(torch.randn(2, 12, 5, 4)).square().sum().backward()
    bytes_of = [
        range(p.grad.data_ptr(), p.grad.data_ptr() + 4 * p.numel(), 4) for p in module.parameters()
    ]
    assert len(set().union(*bytes_of)) == sum(map(len, bytes_of))

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import copy
import socket
from functools import partial

import numpy as np
import pytest
import torch
from conftest import randomize_norms_
from reference import rp_cpe
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from mmlinglo.models import ConditionalPositionalEncoding, literal

VARIANTS = pytest.mark.parametrize(
    ('num_branches', 'skip'), [(1, False), (1, True), (4, False), (4, True)]
)


def random_encoding(channels=6, **kwargs):
    return randomize_norms_(ConditionalPositionalEncoding(channels, **kwargs)).double()


def reference(encoding, x, skip, use_batch_statistics):
    branches = [
        dict(
            kernel=b.conv.weight.detach().numpy()[:, 0],
            gamma=b.bn.weight.detach().numpy(),
            beta=b.bn.bias.detach().numpy(),
            mean=b.bn.running_mean.numpy().copy(),
            var=b.bn.running_var.numpy().copy(),
        )
        for b in encoding.branches
    ]
    return torch.from_numpy(rp_cpe(x.numpy(), branches, skip, use_batch_statistics))


@VARIANTS
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('size', [(1, 1), (1, 5), (6, 7)])
def test_matches_the_paper(num_branches, skip, training, size):
    encoding = random_encoding(num_branches=num_branches, skip=skip).train(training)
    x = torch.randn(3, 6, *size, dtype=torch.float64) + 5
    expected = reference(encoding, x, skip, use_batch_statistics=training)
    assert_close(encoding(x).detach(), expected, rtol=1e-10, atol=1e-10)
    with literal():
        assert_close(encoding(x).detach(), expected, rtol=1e-10, atol=1e-10)


def train_once(encoding, x, head):
    encoding, x = copy.deepcopy(encoding), x.clone().requires_grad_()
    out = encoding(x)
    gradients = torch.autograd.grad((out * head).sum(), [x, *encoding.parameters()])
    return out.detach(), gradients, encoding.state_dict()


@pytest.mark.parametrize('amplitude', [1, 100])
def test_kernels_that_cancel_what_they_read(amplitude):
    """Second differences of a smooth map: their variance is a millionth of its terms."""
    encoding = ConditionalPositionalEncoding(2).train()
    for branch in encoding.branches:
        branch.conv.weight.data[:] = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])
    ramp = torch.linspace(-3, 3, 100)
    x = amplitude * torch.exp(-ramp.square() - ramp.square().unsqueeze(1)).repeat(1, 2, 1, 1)
    head = torch.randn_like(x)
    with literal():
        exact = train_once(copy.deepcopy(encoding).double(), x.double(), head.double())
    assert relative_difference(train_once(encoding, x, head), exact) < 1e-3
    synchronized = torch.nn.SyncBatchNorm.convert_sync_batchnorm(encoding)
    assert train_once(synchronized, x, head)[0].isfinite().all()  # with no definition on a CPU


def relative_difference(found, expected):
    """The largest, each tensor's by its largest entry."""
    if isinstance(expected, torch.Tensor):
        return ((found - expected).abs().max() / expected.abs().max()).item()
    if isinstance(expected, dict):
        found, expected = found.values(), expected.values()
    return max(map(relative_difference, found, expected))


def test_a_single_value_per_channel_is_refused():
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        ConditionalPositionalEncoding(4).train()(torch.randn(1, 4, 1, 1))


def count_call(calls, function, *args, **kwargs):
    calls.append(function)
    return function(*args, **kwargs)


def synchronized_worker(rank, port, shapes, out):
    """Ranks 0, 1 and 3 are a group, rank 2 is alone."""
    torch.distributed.init_process_group(
        'gloo', init_method=f'tcp://127.0.0.1:{port}', world_size=4, rank=rank
    )
    group, _ = torch.distributed.new_subgroups_by_enumeration([[0, 1, 3], [2]])
    exchanges = []
    for name in ('all_gather_into_tensor', 'all_reduce'):
        exchange = partial(count_call, exchanges, getattr(torch.distributed, name))
        setattr(torch.distributed, name, exchange)
    torch.manual_seed(0)
    encoding = random_encoding().train()
    encoding = torch.nn.SyncBatchNorm.convert_sync_batchnorm(encoding, group)
    images = [torch.randn(shape, dtype=torch.float64) + i for i, shape in enumerate(shapes)]
    heads = [torch.randn_like(image) for image in images]
    x = images[rank].requires_grad_()
    y = encoding(x)
    (y * heads[rank]).sum().backward()
    number = len(exchanges)
    gradients = {name: p.grad for name, p in encoding.named_parameters()}
    for gradient in gradients.values():
        # as DistributedDataParallel does, up to the mean
        torch.distributed.all_reduce(gradient, group=group)
    state = encoding.state_dict()
    torch.save((y.detach(), x.grad, gradients, state, number), f'{out}/{rank}.pt')
    torch.distributed.destroy_process_group()


@pytest.fixture(scope='module')
def synchronized(tmp_path_factory):
    """Results of four real processes with maps of different sizes, a single position among them."""
    out = str(tmp_path_factory.mktemp('synchronized'))
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    shapes = [(2, 6, 5, 4), (2, 6, 3, 6), (2, 6, 4, 4), (1, 6, 1, 1)]
    torch.multiprocessing.spawn(synchronized_worker, (port, shapes, out), nprocs=4)
    return shapes, [torch.load(f'{out}/{rank}.pt') for rank in range(4)]


@pytest.mark.parametrize('group', [[0, 1, 3], [2]])
def test_synchronized_statistics_are_those_of_a_group(group, synchronized):
    """Against batch norm over all values of the group at once."""
    shapes, results = synchronized
    torch.manual_seed(0)
    encoding = random_encoding().train()
    images = [torch.randn(shape, dtype=torch.float64) + i for i, shape in enumerate(shapes)]
    heads = [torch.randn_like(image) for image in images]
    images, heads = ([tensors[rank] for rank in group] for tensors in (images, heads))
    images = [image.requires_grad_() for image in images]
    outs = list(images)
    for branch in encoding.branches:
        maps = [branch.conv(image).transpose(0, 1).flatten(1).t() for image in images]
        parts = branch.bn(torch.cat(maps)[..., None, None]).split([len(m) for m in maps])
        shares = [
            part.view(len(out), *out.shape[2:], 6).permute(0, 3, 1, 2)
            for part, out in zip(parts, outs)
        ]
        outs = [out + share for out, share in zip(outs, shares)]
    sum((out * head).sum() for out, head in zip(outs, heads)).backward()
    gradients = {name: p.grad for name, p in encoding.named_parameters()}
    for out, image, rank in zip(outs, images, group):
        y, x_grad, got, state, exchanges = results[rank]
        assert exchanges == (2 if len(group) > 1 else 0)  # there and back
        assert_close(y, out.detach(), rtol=1e-9, atol=1e-9)
        assert_close(x_grad, image.grad, rtol=1e-9, atol=1e-9)
        assert_close(got, gradients, rtol=1e-9, atol=1e-9)
        assert_close(state, encoding.state_dict(), rtol=1e-9, atol=1e-9)


@VARIANTS
@pytest.mark.parametrize(
    'norm_layer',
    [torch.nn.BatchNorm2d, partial(torch.nn.BatchNorm2d, affine=False), None],
    ids=['affine', 'not affine', 'none'],
)
def test_deployed_form_is_equal(num_branches, skip, norm_layer):
    encoding = ConditionalPositionalEncoding(6, num_branches, skip, norm_layer)
    if norm_layer is torch.nn.BatchNorm2d:
        randomize_norms_(encoding)
    encoding.double().eval()
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    expected = encoding(x)
    encoding.switch_to_deploy()
    assert_close(encoding(x), expected, rtol=1e-10, atol=1e-10)
    assert [name for name, _ in encoding.named_parameters()] == ['reparam.weight', 'reparam.bias']
    fresh = ConditionalPositionalEncoding(6, deploy=True).double()
    fresh.load_state_dict(encoding.state_dict())
    assert_close(fresh(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('mutation', ['running_mean', 'running_var', 'weight', 'bias'])
def test_each_part_of_the_norm_matters(mutation):
    """What the test above would miss with a fresh batch norm: a fusion that ignores one tensor."""
    encoding = random_encoding().eval()
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    expected = encoding(x)
    fresh = dict(running_mean=0.0, running_var=1.0, weight=1.0, bias=0.0)[mutation]
    wrong = copy.deepcopy(encoding)
    getattr(wrong.branches[2].bn, mutation).data.fill_(fresh)
    wrong.switch_to_deploy()
    assert (wrong(x) - expected).abs().max() > 1e-2


def test_biases_of_convolutions_are_fused():
    """None is built beside a norm, but a user's conversion may."""
    encoding = random_encoding().eval()
    for branch in encoding.branches:
        branch.conv.bias = torch.nn.Parameter(torch.randn(6, dtype=torch.float64))
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    expected = encoding(x)
    encoding.switch_to_deploy()
    assert_close(encoding(x), expected, rtol=1e-10, atol=1e-10)


def test_fusion_is_in_float64():
    """float32 weights are fused without an intermediate rounding."""
    encoding = random_encoding(channels=64).float().eval()
    exact = copy.deepcopy(encoding).double()
    exact.switch_to_deploy()
    encoding.switch_to_deploy()
    assert encoding.reparam.weight.dtype == torch.float32
    assert torch.equal(encoding.reparam.weight, exact.reparam.weight.float())
    assert torch.equal(encoding.reparam.bias, exact.reparam.bias.float())


def test_a_half_precision_kernel_is_rounded_once():
    encoding = random_encoding(channels=64).half().eval()
    kernel, bias = encoding.kernel_and_bias(torch.randn(1, 64, 3, 3).half())
    exact = encoding.fused_kernel_and_bias()
    assert kernel.dtype == bias.dtype == torch.float16
    assert_close((kernel.double(), bias.double()), exact, rtol=5e-4, atol=1e-6)


@pytest.mark.parametrize('trained', [True, False])
def test_what_is_frozen_stays_so(trained):
    encoding = random_encoding().eval().requires_grad_(trained)
    encoding.switch_to_deploy()
    assert [p.requires_grad for p in encoding.parameters()] == [trained] * 2


def test_switch_is_idempotent_and_refuses_training_mode():
    encoding = random_encoding()
    with pytest.raises(RuntimeError, match=r'model\.eval\(\)'):
        encoding.switch_to_deploy()
    assert len(encoding.branches) == 4
    encoding.eval()
    encoding.switch_to_deploy()
    before = encoding.reparam.weight.clone()
    encoding.switch_to_deploy()
    assert torch.equal(encoding.reparam.weight, before)


def test_only_batch_norms_can_be_fused():
    encoding = ConditionalPositionalEncoding(8, norm_layer=partial(torch.nn.GroupNorm, 2)).eval()
    with pytest.raises(TypeError, match='GroupNorm'):
        encoding.switch_to_deploy()
    assert np.isfinite(encoding(torch.randn(1, 8, 4, 4)).detach().numpy()).all()


def test_norms_of_different_groups_are_not_one():
    encoding = torch.nn.SyncBatchNorm.convert_sync_batchnorm(random_encoding())
    assert encoding.is_linear
    encoding.branches[1].bn.process_group = object()
    assert not encoding.is_linear


@pytest.mark.parametrize('training', [True, False])
def test_tensors_without_data(training):
    encoding = random_encoding().train(training)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = encoding(mode.from_tensor(torch.randn(2, 6, 5, 7, dtype=torch.float64)))
    assert out.shape == (2, 6, 5, 7)


def test_names_of_norms():
    for norm, name in ((torch.nn.InstanceNorm2d, 'in'), (partial(torch.nn.GroupNorm, 2), 'gn')):
        branch = ConditionalPositionalEncoding(4, norm_layer=norm).branches[0]
        assert [child for child, _ in branch.named_children()] == ['conv', name]


def test_sizes():
    for wrong in ('channels', 'num_branches'):
        sizes = {**dict(channels=8, num_branches=4), wrong: 0}
        with pytest.raises(ValueError, match=f'^{wrong} must be an integer of at least 1, got 0'):
            ConditionalPositionalEncoding(**sizes)
        ConditionalPositionalEncoding(**{**sizes, wrong: 1})
    assert ConditionalPositionalEncoding(8).extra_repr() == 'skip=True, deploy=False'


def test_the_deployed_form_gives_its_convolution():
    """By which a feed-forward network fuses it with what follows."""
    encoding = ConditionalPositionalEncoding(4, deploy=True)
    assert encoding.is_linear
    assert not encoding.uses_batch_statistics
    kernel, bias = encoding.kernel_and_bias(torch.randn(1, 4, 5, 5))
    assert kernel is encoding.reparam.weight
    assert bias is encoding.reparam.bias

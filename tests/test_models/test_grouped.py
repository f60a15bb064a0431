# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The branches of an encoding as one convolution, against torch's own, branch by branch."""

import copy

import pytest
import torch
from conftest import TINY_ARCH, randomize_norms_
from torch import nn
from torch.testing import assert_close

import mmlinglo
from mmlinglo.models.fast.grouped import GroupedPositionalEncoding


def branch_by_branch(encoding, x):
    out = sum(norm(conv(x)) for conv, norm in encoding.branches)
    return x + out if encoding.skip else out


def count_calls(module, run):
    """Calls of torch's batch norm in what ``run`` does."""
    with torch.profiler.profile() as profile:
        run(module)
    return sum(event.name == 'aten::batch_norm' for event in profile.events())


@pytest.mark.parametrize(('num_branches', 'skip'), [(1, False), (4, True)])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    'norm',
    [
        nn.BatchNorm2d,
        lambda c: nn.BatchNorm2d(c, affine=False, momentum=0.3, eps=0.1),
        lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    ],
)
def test_outputs_gradients_and_statistics(num_branches, skip, layout, norm):
    ours = GroupedPositionalEncoding(6, num_branches, skip, norm).double().train()
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs = copy.deepcopy(ours)
    for step in range(3):
        x = torch.randn(3, 6, 5, 4 + step, dtype=torch.float64) + step
        x = x.contiguous(memory_format=layout)
        head, results = torch.randn_like(x), []
        for encoding, forward in ((ours, ours), (theirs, lambda x: branch_by_branch(theirs, x))):
            leaf = x.clone().requires_grad_()
            out = forward(leaf)
            inputs = [leaf, *encoding.parameters()]
            results.append((out, *torch.autograd.grad((out * head).sum(), inputs)))
        assert_close(*results, rtol=1e-10, atol=1e-10)
        assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-12, atol=1e-12)
        assert results[0][0].is_contiguous(memory_format=layout)


def test_one_batch_norm_for_all_branches():
    encoding, x = GroupedPositionalEncoding(6).train(), torch.randn(2, 6, 5, 5)
    assert count_calls(encoding, lambda m: m(x)) == 1
    encoding.branches[2].bn.register_forward_hook(lambda *_: None)
    assert count_calls(encoding, lambda m: m(x)) == 4


@pytest.mark.parametrize(
    'change',
    [
        lambda e: setattr(e.branches[1].bn, 'momentum', None),
        lambda e: setattr(e.branches[1].bn, 'eps', 0.1),
        lambda e: e.branches[1].bn.eval(),
        lambda e: e.branches[1].append(nn.Identity()),
        lambda e: e.eval(),
    ],
)
def test_unequal_branches_are_computed_otherwise(change):
    encoding = randomize_norms_(GroupedPositionalEncoding(6)).double().train()
    change(encoding)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    expected = x + sum(branch(x) for branch in copy.deepcopy(encoding).branches)
    assert_close(encoding(x), expected, rtol=1e-10, atol=1e-10)


def test_half_precision_stays_so_under_autocast():
    encoding = GroupedPositionalEncoding(6).train()
    with torch.autocast('cpu', torch.bfloat16):
        assert encoding(torch.randn(2, 6, 5, 5).bfloat16()).dtype == torch.bfloat16


def test_network_loads_the_same_weights():
    class Grouped(mmlinglo.LinGlo):
        encoding = GroupedPositionalEncoding

    network = mmlinglo.LinGlo(TINY_ARCH, out_indices=(3,)).double().train()
    grouped = Grouped(TINY_ARCH, out_indices=(3,)).double().train()
    grouped.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with mmlinglo.literal():
        expected = network(x)
    assert_close(grouped(x), expected, rtol=1e-9, atol=1e-9)
    assert_close(grouped.state_dict(), network.state_dict(), rtol=1e-9, atol=1e-9)
    maps = grouped.eval()(x)
    grouped.switch_to_deploy()
    assert_close(grouped(x), maps, rtol=1e-9, atol=1e-9)

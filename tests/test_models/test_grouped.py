# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""What test_rewritings.py does not ask of the branches of an encoding as one convolution."""

import torch
from conftest import TINY_ARCH
from torch.testing import assert_close

import mmlinglo
from mmlinglo.models.fast.grouped import GroupedPositionalEncoding


def count_calls(module, run):
    """Calls of torch's batch norm in what ``run`` does."""
    with torch.profiler.profile() as profile:
        run(module)
    return sum(event.name == 'aten::batch_norm' for event in profile.events())


def test_one_batch_norm_for_all_branches():
    encoding, x = GroupedPositionalEncoding(6).train(), torch.randn(2, 6, 5, 5)
    assert count_calls(encoding, lambda m: m(x)) == 1
    encoding.branches[2].bn.register_forward_hook(lambda *_: None)
    assert count_calls(encoding, lambda m: m(x)) == 4


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

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import copy

import numpy as np
import pytest
import torch
from conftest import randomize_norms_
from reference import rp_cpe
from torch.testing import assert_close

from mmlinglo.models import ConditionalPositionalEncoding

VARIANTS = pytest.mark.parametrize(
    ('num_branches', 'skip'), [(1, False), (1, True), (4, False), (4, True)]
)


def random_encoding(channels=6, **kwargs):
    return randomize_norms_(ConditionalPositionalEncoding(channels, **kwargs)).double()


def reference(encoding, x, use_batch_statistics):
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
    return torch.from_numpy(rp_cpe(x.numpy(), branches, encoding.skip, use_batch_statistics))


@VARIANTS
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('size', [(1, 1), (1, 5), (6, 7)])
def test_matches_the_paper(num_branches, skip, training, size):
    encoding = random_encoding(num_branches=num_branches, skip=skip).train(training)
    x = torch.randn(3, 6, *size, dtype=torch.float64)
    expected = reference(encoding, x, use_batch_statistics=training)
    assert_close(encoding(x).detach(), expected, rtol=1e-10, atol=1e-10)


@VARIANTS
@pytest.mark.parametrize('norm_cfg', [dict(type='BN'), dict(type='BN', affine=False), None])
def test_deployed_form_is_equal(num_branches, skip, norm_cfg):
    encoding = ConditionalPositionalEncoding(6, num_branches, skip, norm_cfg)
    if norm_cfg != dict(type='BN', affine=False):
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


def test_fusion_is_in_float64():
    """float32 weights are fused without an intermediate rounding."""
    encoding = random_encoding(channels=64).float().eval()
    exact = copy.deepcopy(encoding).double()
    exact.switch_to_deploy()
    encoding.switch_to_deploy()
    assert encoding.reparam.weight.dtype == torch.float32
    assert torch.equal(encoding.reparam.weight, exact.reparam.weight.float())
    assert torch.equal(encoding.reparam.bias, exact.reparam.bias.float())


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
    encoding = ConditionalPositionalEncoding(8, norm_cfg=dict(type='GN', num_groups=2)).eval()
    with pytest.raises(TypeError, match='GroupNorm'):
        encoding.switch_to_deploy()
    assert np.isfinite(encoding(torch.randn(1, 8, 4, 4)).detach().numpy()).all()


def test_needs_a_branch():
    with pytest.raises(ValueError, match='got 0'):
        ConditionalPositionalEncoding(8, num_branches=0)


def test_channels_last_stays_channels_last():
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    encoding = ConditionalPositionalEncoding(8)
    assert encoding(x).is_contiguous(memory_format=torch.channels_last)

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The Triton kernels without a GPU: their values by Triton's interpreter, against float64, and what
NVIDIA's compiler makes of them.

The interpreter is chosen when Triton is imported, so it runs in processes of its own: this file is
their program, too.
"""

import copy
import os
import re
import socket
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torch.torch_version import TorchVersion

import mmlinglo
from mmlinglo import LinGlo
from mmlinglo.models import ConditionalPositionalEncoding
from mmlinglo.models.fast import gpu
from mmlinglo.models.fast import patch_moments as eager
from mmlinglo.models.linglo import CheckpointedBlocks

pytest.importorskip('triton')
KERNELS = [
    'product_sums',
    'moments',
    'fuse',
    'weight_sums',
    'fuse_backward',
    'moments_backward',
    'input_gradient',
]
# Of maps (B, C, H, W): single lines, all borders at once, several programs in each direction.
SHAPES = [(3, 4, 1, 5), (3, 4, 6, 1), (2, 18, 1, 1), (3, 4, 2, 2), (2, 3, 5, 7)]
LARGE = (2, 3, 5, 34)  # of strips of three rows


def use_the_interpreter():
    """Let the kernels run on tensors of the CPU."""
    assert os.environ['TRITON_INTERPRET'] == '1'  # read when Triton is imported
    gpu.is_usable = lambda x: x.dtype != torch.float64


def build(channels, **kwargs):
    from conftest import randomize_norms_

    return randomize_norms_(ConditionalPositionalEncoding(channels, **kwargs)).train()


def run(encoding, x, head):
    """Output, gradients of input and parameters, state."""
    encoding, x = copy.deepcopy(encoding), x.clone().requires_grad_()
    out = encoding(x)
    gradients = torch.autograd.grad((out * head).sum(), [x, *encoding.parameters()])
    return [out, *gradients], encoding.state_dict()


def run_in_place(module, x):
    """Gradient of the input; the statistics of the module go on."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(module(x).sin().sum(), x)[0]


def check_moments(shape, layout):
    x = (torch.randn(shape) + 3).contiguous(memory_format=layout).requires_grad_()
    exact = x.detach().double().requires_grad_()
    results, heads = [], None
    for leaf in (x, exact):
        found = eager.patch_moments(leaf)
        heads = heads or [torch.randn_like(moment) for moment in found]
        loss = sum((m * head).sum() for m, head in zip(found, heads))
        results.append([*found, *torch.autograd.grad(loss, leaf)])
    for found, expected in zip(*results):
        assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def check_encoding(shape, layout, dtype, repeat=False, **kwargs):
    """Against the paper's formula in NumPy, and against autograd through the definition in float64."""
    import reference

    channels = shape[1]
    encoding = build(channels, **kwargs)
    x = (torch.randn(shape) + 1).to(dtype).contiguous(memory_format=layout)
    head = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    found, state = run(encoding, x, head)
    with mmlinglo.literal():
        expected, expected_state = run(copy.deepcopy(encoding).double(), x.double(), head.double())
    branches = [
        dict(
            kernel=branch.conv.weight[:, 0].detach().double().numpy(),
            gamma=branch.bn.weight.detach().double().numpy(),
            beta=branch.bn.bias.detach().double().numpy(),
            mean=None,
            var=None,
        )
        for branch in encoding.branches
    ]
    paper = reference.rp_cpe(x.double().numpy(), branches, encoding.skip, use_batch_statistics=True)
    tolerance = {torch.float32: 5e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}[dtype]
    assert found[0].dtype == found[1].dtype == dtype
    for got, want in zip([found[0], *found], [torch.from_numpy(paper), *expected]):
        assert_close(got.double(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
    state_tolerance = dict(rtol=1e-5, atol=1e-5)  # the sums are float32 whatever x is
    for name, value in expected_state.items():
        assert_close(state[name].to(value), value, **state_tolerance)
    if repeat:
        again, _ = run(encoding, x, head)
        assert all(torch.equal(a, b) for a, b in zip(found, again))


def check_large_means():
    """Variances of differences of neighbours, of which the mean's square would leave nothing."""
    for mean in (0.0, 1e3, 1e5):
        x = torch.randn(2, 3, 12, 13) + mean
        _, covariance = gpu.patch_moments(x)
        _, expected = eager.patch_moments(x.double())
        weight = torch.tensor([0, 0, 0, 0.5, -1, 0.5, 0, 0, 0], dtype=torch.float64)
        got, want = (weight @ c.double() @ weight for c in (covariance, expected))
        assert_close(got, want, rtol=2e-5, atol=0)


def check_other_ways():
    x = torch.randn(2, 4, 5, 6, requires_grad=True)
    # Norms of unequal settings have the kernels' moments and torch's algebra, synchronized ones all.
    unequal = build(4)
    unequal.branches[1].bn.eps = 0.1
    synchronized = torch.nn.SyncBatchNorm.convert_sync_batchnorm(build(4))
    for encoding in (unequal, synchronized):
        head, plain = torch.randn_like(x), copy.deepcopy(encoding)
        for branch in plain.branches:
            if encoding is synchronized:  # torch's own is for GPUs only
                norm = torch.nn.BatchNorm2d(4)
                norm.load_state_dict(branch.bn.state_dict())
                branch.bn = norm
        with mmlinglo.literal():
            expected = run(plain, x.detach(), head)
        assert_close(run(encoding, x.detach(), head), expected, rtol=1e-4, atol=1e-4)
    # A second derivative: exact through the moments alone, refused by the whole encoding.
    results = []
    for leaf in (x, x.detach().double().requires_grad_()):
        loss = sum(m.square().sum() for m in eager.patch_moments(leaf))
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), leaf)[0].double())
    assert_close(*results, rtol=1e-3, atol=1e-4)
    (gradient,) = torch.autograd.grad(build(4)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        gradient.sum().backward()
    # Cumulative averages, and blocks that are computed again without updating them again.
    cumulative = build(4, norm_layer=partial(torch.nn.BatchNorm2d, momentum=None))
    again, exact = CheckpointedBlocks(copy.deepcopy(cumulative)), copy.deepcopy(cumulative).double()
    for step in range(3):
        leaf = torch.randn(2, 4, 5, 6) + step
        gradients = [run_in_place(module, leaf) for module in (cumulative, again)]
        assert_close(*gradients, rtol=0, atol=0)
        with mmlinglo.literal():
            exact(leaf.double())
    for name, value in exact.state_dict().items():
        for module in (cumulative, again[0]):
            assert_close(module.state_dict()[name].to(value), value, rtol=1e-5, atol=1e-5)
    # One graph each for forward and backward.
    encoding, head = build(4), torch.randn_like(x)
    compiled = torch.compile(copy.deepcopy(encoding), backend='aot_eager', fullgraph=True)
    leaf = x.detach().clone().requires_grad_()
    found = compiled(leaf)
    gradients = torch.autograd.grad((found * head).sum(), [leaf, *compiled.parameters()])
    expected, state = run(encoding, x.detach(), head)
    assert_close([found, *gradients], expected, rtol=1e-5, atol=1e-5)
    assert_close(compiled._orig_mod.state_dict(), state, rtol=1e-5, atol=1e-5)


def check_network(autocast):
    """A training step of all layers together, against the definition in float64.

    Under autocast the attention alone, with three times the definition's error: the sums of what
    an encoding hands back cancel, and its kernel is rounded once for all branches.
    """
    from conftest import TINY_ARCH, randomize_norms_

    model = randomize_norms_(LinGlo(TINY_ARCH, fast=True)).train()
    model.stages[0].blocks[0].ffn.fc2.bias = None
    parameters = {n: p for n, p in model.named_parameters() if '.attn.' in n or not autocast}
    x = torch.randn(2, 3, 64, 64)

    def train(literal, dtype=torch.float32):
        twin = copy.deepcopy(model).to(dtype)
        with mmlinglo.literal() if literal else nullcontext():
            with torch.autocast('cpu', torch.bfloat16, autocast and dtype == torch.float32):
                outs = twin(x.to(dtype))
        loss = sum((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() for out in outs)
        return [*outs, *torch.autograd.grad(loss, [twin.get_parameter(n) for n in parameters])]

    exact = train(True, torch.float64)
    errors = [
        [float((got - want).norm() / want.norm()) for got, want in zip(train(literal), exact)]
        for literal in (False, True)
    ]
    assert errors[0] != errors[1]  # other operations ran
    assert all(ours < 3 * theirs + 1e-5 for ours, theirs in zip(*errors)), errors


def train_synchronized(rank, port):
    """One of two processes with maps of different sizes, against torch's algebra in float64."""
    use_the_interpreter()
    init = f'tcp://127.0.0.1:{port}'
    torch.distributed.init_process_group('gloo', init_method=init, world_size=2, rank=rank)
    torch.manual_seed(0)
    encoding = torch.nn.SyncBatchNorm.convert_sync_batchnorm(build(4))
    torch.manual_seed(rank)
    x = torch.randn(2, 4, 5 + rank, 7) + rank
    head = torch.randn_like(x)
    found, state = run(encoding, x, head)
    expected, expected_state = run(encoding.double(), x.double(), head.double())
    for got, want in zip(found, expected):
        assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    for name, value in expected_state.items():
        assert_close(state[name].to(value), value, rtol=1e-5, atol=1e-5)
    torch.distributed.destroy_process_group()


def check_synchronized():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train_synchronized, (port,), nprocs=2)


def check(part):
    torch.manual_seed(0)
    use_the_interpreter()
    layouts = torch.contiguous_format, torch.channels_last
    if part == 'small':
        for i, shape in enumerate(SHAPES):
            check_moments(shape, layouts[i % 2])
            if shape[0] * shape[2] * shape[3] > 2:  # of two values every variance is nearly zero
                check_encoding(shape, layouts[(i + 1) % 2], torch.float32)
        check_encoding((2, 3, 5, 7), layouts[0], torch.float32, num_branches=1, skip=False)
        check_large_means()
    elif part == 'large':
        gpu.ROWS = 3
        check_moments(LARGE, layouts[0])
        check_encoding(LARGE, layouts[1], torch.float32, repeat=True)
    elif part == 'half':
        for dtype, layout in zip((torch.float16, torch.bfloat16), layouts):
            check_encoding((3, 4, 5, 7), layout, dtype)
    elif part == 'real size':
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for layout in layouts:
                check_encoding((2, 20, 51, 35), layout, dtype)
    elif part == 'synchronized':
        check_synchronized()
    elif part == 'network':
        check_network(autocast=False)
        check_network(autocast=True)
    else:
        check_other_ways()


@pytest.mark.parametrize(
    'part',
    [
        'small',
        'large',
        'half',
        'network',
        'synchronized',
        'other ways',
        pytest.param('real size', marks=pytest.mark.slow),
    ],
)
def test_values(part):
    if TorchVersion(torch.__version__) < '2.10':
        pytest.skip('not tried with the interpreter of older Tritons')
    environment = {**os.environ, 'TRITON_INTERPRET': '1', 'PYTHONWARNINGS': 'ignore'}
    command = [sys.executable, __file__, part]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]


def compile_ahead(name, dtype, arch, channels_last=True):
    """Registers, bytes of spills and of shared memory of a kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mmlinglo.models.fast import kernels

    kernel = getattr(kernels, name)
    maps = {'x', 'grad', 'kernel', 'kernel_out', 'bias_out'}
    maps |= {'out'} if name == 'input_gradient' else set()
    constants = dict(BLOCK_W=32, BLOCK_C=16, BRANCHES=4, SKIP=True, CONVOLVE=True)
    pointers = {'centre_out', 'sums', 'centre', 'tables', 'mean', 'covariance', 'mean_out'}
    pointers |= {'covariance_out', 'params', 'statistics_out', 'grads', 'grad_params', 'grad_mean'}
    pointers |= {'grad_covariance', 'coefficients', 'out'}
    signature, fixed = {}, {}
    for argument in kernel.arg_names:
        if argument in constants or (channels_last and argument.endswith('channel_stride')):
            signature[argument], fixed[argument] = 'constexpr', constants.get(argument, 1)
        elif argument in maps:
            signature[argument] = f'*{dtype}'
        elif argument == 'left_out':
            signature[argument] = '*i32'
        elif argument in pointers:
            signature[argument] = '*fp32'
        else:
            signature[argument] = 'fp32' if argument in ('n', 'eps', 'unbias') else 'i32'
    target, options = GPUTarget('cuda', arch, 32), dict(num_warps=gpu.WARPS)
    compiled = triton.compile(ASTSource(kernel, signature, fixed), target=target, options=options)
    tool = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(compiled.asm['cubin'])
        file.flush()
        command = [str(tool), '-res-usage', file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r'(REG|STACK|LOCAL):(\d+)', usage)}
    return numbers['REG'], numbers['STACK'] + numbers['LOCAL'], compiled.metadata.shared


def check_resources(name, dtype, arch, channels_last=True):
    registers, spilled, shared = compile_ahead(name, dtype, arch, channels_last)
    # A multiprocessor has 65536 registers, and 99 KiB of shared memory on the smallest of these.
    assert 0 < registers * 32 * gpu.WARPS <= 65536
    assert spilled == 0
    assert shared <= 48 * 1024


@pytest.mark.parametrize('name', KERNELS)
def test_compiled_for_an_h100(name):
    check_resources(name, 'fp16', 90)


@pytest.mark.slow
@pytest.mark.parametrize('name', KERNELS)
@pytest.mark.parametrize('arch', [80, 90, 100, 120])
@pytest.mark.parametrize('dtype', ['fp32', 'fp16', 'bf16'])
@pytest.mark.parametrize('channels_last', [True, False])
def test_compiled_for_all(name, dtype, arch, channels_last):
    check_resources(name, dtype, arch, channels_last)


def test_which_tensors_take_the_kernels(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    if TorchVersion(torch.__version__) < '2.10':
        pytest.skip('torch 2.5 has no CUDA tensors without data where there is no GPU')

    with FakeTensorMode():
        on_gpu = torch.empty(2, 3, 4, 5, device='cuda')
        assert gpu.is_usable(on_gpu)
        assert gpu.is_usable(on_gpu.half())
        for other in (on_gpu.double(), on_gpu[:0], torch.empty(2, 3, 4, 5)):
            assert not gpu.is_usable(other)
        monkeypatch.setattr(gpu, 'HAS_TRITON', False)
        assert not gpu.is_usable(on_gpu)


def test_tables_are_kept_on_a_device():
    like = torch.empty(3, device='meta')
    assert eager._keep_like(like, eager._TABLES) is eager._keep_like(like, eager._TABLES)
    sizes = [eager._keep_like(like, [torch.ones(9)], 5, 7) for _ in range(2)]
    assert sizes[0] is sizes[1]
    assert gpu._tables(torch.device('cpu'))[0] is gpu._tables(torch.device('cpu'))[0]


if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).parent.parent))
    check(sys.argv[1])

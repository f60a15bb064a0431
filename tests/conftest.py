# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import importlib
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.torch_version import TorchVersion

import mmlinglo  # noqa: F401  # before mmcv.ops, for which it may stand in

ROOT = Path(__file__).parent.parent
TINY_ARCH = dict(
    embed_dims=(8, 16, 24, 32), depths=(1, 2, 1, 1), num_heads=(1, 2, 3, 4), mlp_ratio=(2, 2, 2, 2)
)
needs_counting = pytest.mark.skipif(
    TorchVersion(torch.__version__) < '2.10',
    reason='torch 2.5 aborts at convolutions of CUDA tensors without data',
)
needs_exporter = pytest.mark.skipif(
    not hasattr(torch.export.Dim, 'DYNAMIC'),
    reason='the ONNX exporter of torch 2.5 knows fixed sizes and opset 18 only',
)


CORE = (
    'test_models',
    'test_mmcv_ops.py',
    'test_engine/test_layer_decay.py',
    'test_utils/test_deploy.py',
)
NOT_CORE = (
    'test_models/test_gpu_kernels.py',  # runs Triton's interpreter in processes of its own
    'test_models/test_mask_padding.py',  # builds whole detectors
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark what ``run_tests.sh --quick`` runs: what the package computes, without starting programs."""
    for item in items:
        name = item.path.relative_to(ROOT / 'tests').as_posix()
        if name.startswith(CORE) and not name.startswith(NOT_CORE):
            if not any(map(item.get_closest_marker, ('slow', 'soak'))):
                item.add_marker('core')


@pytest.fixture(autouse=True)
def _same_start():
    """Each test starts with the same random numbers, and leaves no variable behind, as a tool's ``main`` does."""
    torch.manual_seed(0)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def randomize_norms_(module: torch.nn.Module) -> torch.nn.Module:
    """Give batch norms statistics and weights as after training; fresh ones hide wrong fusions."""
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            for tensor in (norm.weight, norm.bias, norm.running_mean):  # None by some arguments
                if tensor is not None:
                    torch.nn.init.normal_(tensor)  # negative weights too
            if norm.running_var is not None:
                torch.nn.init.uniform_(norm.running_var, 0.1, 5.0)
    return module


def run_tool(*args, check=True, **env) -> subprocess.CompletedProcess:
    """Run a command line in the checkout, `.py` by this Python and `.sh` by bash."""
    args = [str(arg) for arg in args]
    program = [sys.executable] if args[0].endswith('.py') else ['bash']
    environment = {**os.environ, 'PYTHON': sys.executable, 'CUDA_VISIBLE_DEVICES': '', **env}
    result = subprocess.run(
        program + args, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    if check and result.returncode:
        raise AssertionError(f'{args} ended with {result.returncode}:\n{result.stderr[-4000:]}')
    return result


def import_tool(path: str):
    """The module of a command line under tools/, to call its ``main(argv)`` in this process."""
    folder = str((ROOT / path).parent)
    if folder not in sys.path:  # some tools import their neighbours
        sys.path.append(folder)
    return importlib.import_module(Path(path).stem)


@pytest.fixture(scope='session')
def shapes(tmp_path_factory) -> Path:
    """A very small synthetic data set in the layouts of all three tasks."""
    out = tmp_path_factory.mktemp('data') / 'shapes'
    numbers = '--num-train 16 --num-val 8 --num-demo 2 --size 64'.split()
    assert import_tool('tools/misc/make_shapes.py').main([str(out), *numbers]) == 0
    return out


@pytest.fixture(scope='session')
def cifar10(tmp_path_factory) -> Path:
    """Twenty training and ten test images in folders like those of CIFAR-10."""
    root = tmp_path_factory.mktemp('cifar10')
    rng = np.random.default_rng(0)
    for split, count in (('train', 2), ('test', 1)):
        for label in range(10):
            folder = root / split / f'class{label}'
            folder.mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                cv2.imwrite(str(folder / f'{i}.png'), image)
    return root

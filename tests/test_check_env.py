# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""What is wrong with an environment, and the line to run: environments with one fault each."""

import importlib.metadata
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import pytest
import torch
import torchvision
from conftest import ROOT

from mmlinglo import check_env
from mmlinglo.check_env import FORKS, ORIGINALS, Environment, find_problems, report


def healthy(stack=FORKS, torch='2.11.0', torchvision='0.26.0', **kwargs) -> Environment:
    versions = dict(requirement.split('==') for requirement in stack.values())
    versions.update(torch=torch, torchvision=torchvision, numpy='2.2.6', setuptools='79.0.1')
    operators = {('mmcv', 'cpu'): '', ('torchvision', 'cpu'): ''}
    env = Environment('3.11.7', versions, wanted_torch=torch, operators=operators)
    return replace(env, **kwargs)


def healthy_original() -> Environment:
    env = healthy(ORIGINALS, torch='2.5.1', torchvision='0.20.1')
    env.versions.update(numpy='1.26.4')
    return env


def with_versions(env, **versions):
    versions = {name.replace('_', '-'): version for name, version in versions.items()}
    env.versions.update(versions)
    for name, version in versions.items():
        if version is None:
            del env.versions[name]
    return env


def with_gpu(env, name='NVIDIA H100', code='sm_90', **kwargs):
    operators = {**env.operators, ('mmcv', 'cuda'): '', ('torchvision', 'cuda'): ''}
    gpu = dict(cuda='13.0', gpus=[(name, code)] * 2, driver=True, operators=operators)
    return replace(env, architectures=['sm_75', 'sm_80', 'sm_90'], **{**gpu, **kwargs})


WITHOUT_MMDET = replace(
    with_versions(healthy(), onedl_mmdetection=None),
    errors=dict.fromkeys(('mmdet', 'timm'), 'ModuleNotFoundError: No module named ...'),
)
NO_EXT = "ModuleNotFoundError: No module named 'mmcv._ext'"
ABI = 'ImportError: _ext.so: undefined symbol: _ZN3c10'
GL = 'ImportError: libGL.so.1: cannot open shared object file'
NO_KERNEL = 'RuntimeError: CUDA error: no kernel image is available'

FAULTS = {
    'no torch': (
        replace(with_versions(healthy(), torch=None), operators={}, errors={'torch': 'x'}),
        'torch is not installed',
        'pip install torch==2.11.0 torchvision==0.26.0',
    ),
    'no torch, original': (
        replace(with_versions(healthy_original(), torch=None), operators={}),
        'torch is not installed',
        'pip install torch==2.5.1 torchvision==0.20.1',
    ),
    'old torch': (
        healthy(torch='2.0.1', torchvision='0.15.2'),
        'torch 2.0.1 is older than 2.1',
        'pip install torch==2.11.0',
    ),
    'torchvision of another torch': (
        replace(healthy(torch='2.10.0+cpu'), wanted_torch='2.11.0'),
        'torchvision 0.26.0 was built for torch 2.11.0, not 2.10.0+cpu',
        'pip install --no-deps torchvision==0.25.0',
    ),
    'no torchvision': (
        with_versions(healthy(), torchvision=None),
        'torchvision is not installed',
        'pip install --no-deps torchvision==0.26.0',
    ),
    'torchvision of another device': (
        healthy(errors={'torchvision': 'RuntimeError: operator torchvision::nms does not exist'}),
        'builds for different devices (RuntimeError: operator',
        'pip install --force-reinstall torch==2.11.0 torchvision==0.26.0',
    ),
    'no operators': (
        healthy(errors={'mmcv operators': NO_EXT}, operators={}),
        'built out of sight of torch',
        '--no-cache-dir --no-build-isolation onedl-mmcv==2.3.6',
    ),
    'operators of another torch': (
        healthy(errors={'mmcv operators': ABI}, operators={}),
        f'compiled for another torch ({ABI})',
        'MMCV_WITH_OPS=1 python -m pip install --force-reinstall',
    ),
    'wrong operators': (
        healthy(
            operators={('mmcv', 'cpu'): 'ValueError: NMS keeps the boxes [0] instead of [0, 2]'}
        ),
        "mmcv's operators do not work on every device (on cpu: ValueError: NMS keeps",
        'onedl-mmcv==2.3.6',
    ),
    'operators without the GPU': (
        with_gpu(healthy(), operators={('mmcv', 'cpu'): '', ('mmcv', 'cuda'): NO_KERNEL}),
        f'(on cuda: {NO_KERNEL})',
        "MMCV_WITH_OPS=1 FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST='9.0' python -m pip",
    ),
    'lite': (
        replace(
            with_versions(healthy_original(), mmcv=None, mmcv_lite='2.1.0'),
            errors={'mmcv operators': NO_EXT},
        ),
        'mmcv-lite has no operators',
        'pip uninstall -y mmcv-lite && ',
    ),
    'no mmcv': (
        replace(with_versions(healthy(), onedl_mmcv=None), errors={'mmcv': 'ModuleNotFoundError'}),
        'mmcv is not installed',
        '--no-build-isolation onedl-mmcv==2.3.6',
    ),
    'two mmcvs': (
        with_versions(healthy(), mmcv='2.1.0'),
        'onedl-mmcv and mmcv are both installed',
        'pip uninstall -y onedl-mmcv mmcv && ',
    ),
    'two stacks': (
        with_versions(healthy(), onedl_mmdetection=None, mmdet='3.3.0'),
        'mmdet of OpenMMLab beside onedl-mmengine',
        'pip uninstall -y mmdet && python -m pip install onedl-mmdetection==3.5.1',
    ),
    'numpy 2, original': (
        with_versions(healthy_original(), numpy='2.2.6'),
        'numpy 2.2.6',
        "pip install 'numpy<2' 'opencv-python<4.12'",
    ),
    'new mmcv, original': (
        with_versions(healthy_original(), mmcv='2.2.0'),
        'refuse mmcv 2.2.0',
        '--no-build-isolation mmcv==2.1.0',
    ),
    'new torch, original': (
        replace(
            with_versions(healthy_original(), torch='2.6.0', torchvision='0.21.0'),
            wanted_torch='2.6.0',
        ),
        'with torch 2.6.0, mmengine 0.10.7 cannot resume',
        'pip install torch==2.5.1 torchvision==0.20.1 && ',
    ),
    'no pkg_resources': (
        replace(
            with_versions(healthy_original(), setuptools='82.0'),
            errors={'mmdet': "ModuleNotFoundError: No module named 'pkg_resources'"},
        ),
        'setuptools 82.0 has no pkg_resources',
        "pip install 'setuptools<80'",
    ),
    'no code for the GPU': (
        with_gpu(healthy(), 'NVIDIA B200', 'sm_100'),
        'no code for NVIDIA B200 (sm_100), only for sm_75 sm_80 sm_90',
        'pip install --upgrade torch torchvision',
    ),
    'a driver but torch for the CPU': (
        replace(healthy(torch='2.11.0+cpu'), driver=True, wanted_torch='2.11.0'),
        'NVIDIA driver, but this torch was built without CUDA',
        '--index-url https://pypi.org/simple torch==2.11.0 torchvision==0.26.0',
    ),
    'an old driver': (
        replace(healthy(), driver=True, cuda='13.0', gpu_error='RuntimeError: driver is too old'),
        'torch (CUDA 13.0) cannot use the GPU: RuntimeError: driver is too old',
        'nvidia-smi',
    ),
    'no libGL': (
        healthy(errors=dict.fromkeys(('cv2', 'mmcv', 'mmcv operators', 'mmdet', 'mmlinglo'), GL)),
        f'cv2 cannot be imported: {GL}',
        'opencv-python-headless',
    ),
    'a broken toolbox': (
        healthy(errors={'mmdet': 'ImportError: no scipy'}),
        'mmdet.apis cannot be imported: ImportError: no scipy',
        'pip install --force-reinstall --no-deps onedl-mmdetection==3.5.1',
    ),
    'a broken mmlinglo': (
        healthy(errors={'mmlinglo': 'SyntaxError: invalid syntax'}),
        'mmlinglo.models cannot be imported: SyntaxError',
        'python -c "import mmlinglo.models"',
    ),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_one_fault_gives_one_problem_and_its_remedy(fault):
    env, what, run = FAULTS[fault]
    problems = find_problems(env)
    assert len(problems) == 1, problems
    assert what in problems[0].what
    assert run in problems[0].run
    text = report(env, problems)
    assert f'1. {problems[0].what}\n   run: {problems[0].run}' in text
    assert '1 problem,' in text


@pytest.mark.parametrize(
    'env',
    [
        healthy(),
        healthy_original(),
        with_gpu(healthy()),
        with_gpu(healthy(), 'NVIDIA L40S', 'sm_89'),  # served by sm_80
        WITHOUT_MMDET,
    ],
)
def test_nothing_is_wrong(env):
    assert find_problems(env) == []
    text = report(env, [])
    assert text.endswith('No problem found.')
    stack = 'original OpenMMLab' if env.original else 'maintained forks'
    assert re.search(rf'^stack +{stack}', text, re.MULTILINE)


def test_a_bare_environment():
    missing = dict.fromkeys(check_env.IMPORTS, 'ModuleNotFoundError: No module named ...')
    env = Environment('3.11.7', errors=missing)
    problems = find_problems(env)
    assert [problem.what.split()[0] for problem in problems] == ['torch', 'mmengine', 'mmcv']
    assert re.search(r'^stack +none$', report(env, problems), re.MULTILINE)


def test_report_says_what_a_missing_toolbox_is_for():
    text = report(WITHOUT_MMDET, [])
    assert re.search(r'^mmdet +not installed \(needed for detection\)$', text, re.MULTILINE)


@pytest.mark.parametrize(
    ('built', 'gpu', 'expected'),
    [
        ('sm_90', 'sm_90', True),
        ('sm_80', 'sm_89', True),
        ('sm_90a', 'sm_90', True),
        ('sm_89', 'sm_80', False),
        ('sm_90', 'sm_100', False),
        ('compute_90', 'sm_100', True),
        ('compute_120', 'sm_100', False),
    ],
)
def test_architectures(built, gpu, expected):
    """Binary code runs on its own generation from its own number on; PTX on everything later."""
    assert check_env._serves(built, gpu) is expected


@pytest.mark.parametrize(
    ('torch', 'torchvision'), [('2.1.2', '0.16.2'), ('2.5.1', '0.20.1'), ('2.11.0', '0.26.0')]
)
def test_torchvision_for_torch(torch, torchvision):
    assert check_env._torchvision_for(torch) == torchvision


@pytest.mark.parametrize(('name', 'stack'), [('onedl', FORKS), ('openmmlab', ORIGINALS)])
def test_versions_are_those_of_the_requirements(name, stack):
    script = 'source tools/stack.sh; echo $TORCH $TORCHVISION $MMINSTALL'
    torch, torchvision, requirements = subprocess.run(
        ['bash', '-c', script],
        cwd=ROOT,
        env={**os.environ, 'MMLINGLO_STACK': name},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    lines = set(Path(requirements).read_text().splitlines())
    assert {stack[name] for name in check_env.TOOLBOXES} <= lines
    assert stack['torch'] == f'torch=={torch}'
    assert check_env._torchvision_for(torch) == torchvision


def test_unknown_stack():
    result = subprocess.run(
        ['bash', 'tools/setup_env.sh'],
        cwd=ROOT,
        env={**os.environ, 'MMLINGLO_STACK': 'mmlab'},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr == "error: MMLINGLO_STACK is 'mmlab'; it can be onedl or openmmlab\n"


def run_check(*folders):
    path = ':'.join(map(str, folders))
    return subprocess.run(
        [sys.executable, '-m', 'mmlinglo.check_env'],
        env={
            'PYTHONPATH': f'{path}:{ROOT}',
            'CUDA_VISIBLE_DEVICES': '',
            'PATH': '/usr/bin:/bin',
        },
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_what_is_collected(capsys):
    env = check_env.collect()
    assert env.versions['torch'] == importlib.metadata.version('torch')
    assert env.wanted_torch == torch.__version__.split('+')[0]
    assert env.errors == {}
    assert env.operators['mmcv', 'cpu'] == env.operators['torchvision', 'cpu'] == ''
    assert env.details['OpenCV'] == cv2.__version__
    with pytest.raises(SystemExit) as ended:
        check_env.main()
    assert not ended.value.code
    assert capsys.readouterr().out.endswith('No problem found.\n')


def test_operators_that_compute_something_else(monkeypatch):
    """What a build for another device may do without an error."""
    monkeypatch.setattr(torchvision.ops, 'nms', lambda *_: torch.tensor([0]))
    env = check_env.collect()
    assert env.operators['mmcv', 'cpu'] == ''
    wrong = 'ValueError: NMS keeps the boxes [0] instead of [0, 2]'
    assert env.operators['torchvision', 'cpu'] == wrong
    assert wrong in find_problems(env)[0].what


@pytest.mark.slow
def test_this_environment():
    result = run_check()
    assert result.returncode == 0, result.stdout
    assert re.search(r'^mmcv .*operators work on: cpu$', result.stdout, re.MULTILINE)
    assert 'No problem found.' in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize('package', ['mmengine', 'cv2', 'torchvision'])
def test_broken_packages(package, tmp_path):
    """mmlinglo itself cannot be imported without the first two."""
    (tmp_path / package).mkdir()
    (tmp_path / package / '__init__.py').write_text("raise ImportError('broken\\nby a test')")
    result = run_check(tmp_path)
    assert result.returncode == 1, result.stderr
    assert re.search(rf'^1\. .*{package}.*ImportError: broken', result.stdout, re.MULTILINE)
    assert '2. ' not in result.stdout
    assert 'Traceback' not in result.stderr  # warnings of the original mmengine may be


@pytest.mark.slow
def test_missing_operators(tmp_path):
    blocker = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == 'mmcv._ext':
            raise ModuleNotFoundError(f"No module named '{name}'")
sys.meta_path.insert(0, Blocker())
"""
    (tmp_path / 'sitecustomize.py').write_text(blocker)
    result = run_check(tmp_path)
    assert result.returncode == 1
    assert '1. mmcv was built out of sight of torch' in result.stdout
    assert '2. ' not in result.stdout


def test_other_imports_still_fail_loudly(tmp_path):
    (tmp_path / 'mmengine').mkdir()
    (tmp_path / 'mmengine/__init__.py').write_text("raise ImportError('broken by a test')")
    result = subprocess.run(
        [sys.executable, '-c', 'import mmlinglo'],
        env={'PYTHONPATH': f'{tmp_path}:{ROOT}'},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert 'ImportError: broken by a test' in result.stderr

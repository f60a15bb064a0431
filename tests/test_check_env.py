# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""What is wrong with an environment, and the line to run: environments with one fault each."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace

import cv2
import pytest
import torch
import torchvision
from conftest import ROOT

from mmlinglo import check_env, mmcv_ops
from mmlinglo.check_env import Environment, find_problems, read_requirements, report


def healthy(original=False, **changes) -> Environment:
    """The tested versions; ``changes`` sets versions of distributions, or removes them."""
    pins = read_requirements(original)
    versions = {name: pin[2:] for name, pin in pins.items() if pin.startswith('==')}
    versions.update(numpy='1.26.4' if original else '2.2.6', setuptools='79.0.1', mmlinglo='0.1.0')
    versions.update({name.replace('_', '-'): version for name, version in changes.items()})
    versions = {name: version for name, version in versions.items() if version is not None}
    return Environment(versions, operators='compiled; work on: cpu')


def failing(env, **errors):
    """``env`` with errors, by module: '__' stands for a dot and '_on_' for ' on '."""
    names = {name: name.replace('__', '.').replace('_on_', ' on ') for name in errors}
    return replace(env, errors={names[name]: error for name, error in errors.items()})


MISSING = 'ModuleNotFoundError: No module named ...'
ABI = 'ImportError: _ext.so: undefined symbol: _ZN3c10'
GL = 'ImportError: libGL.so.1: cannot open shared object file'
NO_KERNEL = 'RuntimeError: CUDA error: no kernel image is available'
TORCH, TORCHVISION = (read_requirements(False)[name][2:] for name in ('torch', 'torchvision'))
WITHOUT_MMDET = failing(healthy(onedl_mmdetection=None), mmdet__apis=MISSING)

FAULTS = {
    'no torch': (
        failing(healthy(torch=None), torch=MISSING),
        'torch is not installed',
        f'pip install torch=={TORCH} torchvision=={TORCHVISION}',
    ),
    'no torch, original': (
        failing(healthy(original=True, torch=None), torch=MISSING),
        'torch is not installed',
        'pip install torch==2.5.1 torchvision==0.20.1',
    ),
    'old torch': (
        healthy(torch='2.0.1', torchvision='0.15.2'),
        'torch 2.0.1 is older than 2.5',
        f'pip install torch=={TORCH}',
    ),
    'torchvision of another torch': (
        failing(
            healthy(torch='2.10.0+cpu'),
            torchvision__ops='RuntimeError: operator torchvision::nms does not exist',
        ),
        'torch 2.10.0 and torchvision do not work (torchvision.ops: RuntimeError: operator',
        'pip install --force-reinstall torch==2.10.0 torchvision==0.25.0',
    ),
    'no torchvision': (
        failing(healthy(torchvision=None), torchvision__ops=MISSING),
        'torchvision do not work',
        f'torchvision=={TORCHVISION}',
    ),
    'torchvision without the GPU': (
        failing(healthy(), torchvision__ops_on_cuda='NotImplementedError: nms'),
        'torchvision.ops on cuda: NotImplementedError',
        f'pip install --force-reinstall torch=={TORCH} torchvision=={TORCHVISION}',
    ),
    'a GPU that torch cannot use': (
        failing(healthy(), torch_on_cuda=NO_KERNEL),
        f'cannot use the GPU (torch on cuda: {NO_KERNEL})',
        'nvidia-smi',
    ),
    'operators of another torch': (
        failing(healthy(), mmcv__ops=ABI),
        f'compiled for another torch or without CUDA (mmcv.ops: {ABI})',
        '--force-reinstall --no-deps --no-cache-dir --no-build-isolation',
    ),
    'wrong operators': (
        failing(
            healthy(), mmcv__ops_on_cpu='ValueError: NMS keeps the boxes [0] instead of [0, 2]'
        ),
        'ValueError: NMS keeps the boxes [0]',
        'mmcv==',
    ),
    'operators without the GPU': (
        failing(healthy(), mmcv__ops_on_cuda=NO_KERNEL),
        f'(mmcv.ops on cuda: {NO_KERNEL})',
        '--no-build-isolation',
    ),
    'no mmcv': (
        failing(healthy(onedl_mmcv=None), mmcv__transforms=MISSING, mmcv__ops=MISSING),
        'mmcv is not installed',
        'pip install onedl-mmcv==2.3.6',
    ),
    'two mmcvs': (
        healthy(mmcv='2.1.0'),
        'onedl-mmcv and mmcv are both installed',
        'pip uninstall -y onedl-mmcv mmcv && ',
    ),
    'two stacks': (
        healthy(onedl_mmdetection=None, mmdet='3.3.0'),
        'mmdet of OpenMMLab beside forks',
        'pip uninstall -y mmdet && python -m pip install onedl-mmdetection==3.5.1',
    ),
    'numpy 2, original': (
        healthy(original=True, numpy='2.2.6'),
        'older versions than numpy 2.2.6',
        "pip install 'numpy<2'",
    ),
    'new mmcv, original': (
        healthy(original=True, mmcv='2.2.0'),
        'older versions than mmcv 2.2.0',
        "pip install 'mmcv==2.1.0'",
    ),
    'new torch, original': (
        healthy(original=True, torch='2.6.0', torchvision='0.21.0'),
        'older versions than torch 2.6.0, torchvision 0.21.0',
        "pip install 'torch==2.5.1' 'torchvision==0.20.1'",
    ),
    'no pkg_resources': (
        failing(healthy(original=True, setuptools='82.0'), mmdet__apis=MISSING),
        'older versions than setuptools 82.0',
        "pip install 'setuptools<80'",
    ),
    'no libGL': (
        failing(healthy(), cv2=GL, mmcv__transforms=GL, mmcv__ops=GL, mmlinglo__models=GL),
        f'cv2 cannot be imported: {GL}',
        'opencv-python-headless',
    ),
    'a broken toolbox': (
        failing(healthy(), mmdet__apis='ImportError: no scipy'),
        'mmdet.apis cannot be imported: ImportError: no scipy',
        'pip install --force-reinstall --no-deps onedl-mmdetection',
    ),
    'a broken mmlinglo': (
        failing(healthy(), mmlinglo__models='SyntaxError: invalid syntax'),
        'mmlinglo.models cannot be imported: SyntaxError',
        'python -c "import mmlinglo.models"',
    ),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_one_fault_gives_one_problem_and_its_remedy(fault):
    env, what, run = FAULTS[fault]
    problems = find_problems(env)
    assert len(problems) == 1, problems
    assert what in problems[0][0]
    assert run in problems[0][1]
    text = report(env, problems)
    assert '1 problem(s)' in text
    assert f'1. {problems[0][0]}\n   run: {problems[0][1]}' in text


OLDER = healthy(original=True, torch='2.5.0', torchvision='0.20.0', mmdet='3.2.0')


@pytest.mark.parametrize('env', [healthy(), healthy(original=True), WITHOUT_MMDET, OLDER])
def test_nothing_is_wrong(env):
    assert find_problems(env) == []
    text = report(env, [])
    assert text.endswith('No problem found.')
    stack = 'original OpenMMLab' if env.is_original else 'maintained forks'
    assert re.search(rf'^stack +{stack}', text, re.MULTILINE)


def test_a_bare_environment():
    env = Environment(errors=dict.fromkeys(check_env.IMPORTS, MISSING))
    assert [what.split()[0] for what, _ in find_problems(env)] == ['torch', 'mmengine', 'mmcv']


def test_report_says_what_a_missing_toolbox_is_for():
    text = report(WITHOUT_MMDET, [])
    assert re.search(r'^mmdet +not installed \(needed for detection\)$', text, re.MULTILINE)


@pytest.mark.parametrize('original', [False, True])
def test_requirements_of_an_installed_package_are_those_of_the_checkout(original, monkeypatch):
    """Without a checkout they come from the wheel's metadata, whose extras pyproject.toml lists."""
    expected = read_requirements(original)
    tomllib = pytest.importorskip('tomllib')
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
    metadata = []
    for extra, files in project['tool']['setuptools']['dynamic']['optional-dependencies'].items():
        names = [files['file']] if isinstance(files['file'], str) else files['file']
        lines = [line for name in names for line in (ROOT / name).read_text().splitlines()]
        metadata += [f'{line}; extra == "{extra}"' for line in lines if not line.startswith('#')]
    monkeypatch.setattr(importlib.metadata, 'requires', {'mmlinglo': metadata}.get)
    monkeypatch.setattr(check_env, '__file__', '/site-packages/mmlinglo/check_env.py')
    assert read_requirements(original) == expected
    assert {'torch', 'torchvision'} < {*expected}


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
    assert env.errors == {}
    assert env.operators.endswith('; work on: cpu')
    assert env.details['OpenCV'] == cv2.__version__
    with pytest.raises(SystemExit) as ended:
        check_env.main([])
    assert not ended.value.code
    assert capsys.readouterr().out.endswith('No problem found.\n')


def test_operators_that_compute_something_else(monkeypatch):
    """What a build for another device may do without an error."""
    monkeypatch.setattr(torchvision.ops, 'nms', lambda *_: torch.tensor([0]))
    env = check_env.collect()
    assert 'mmcv.ops on cpu' not in env.errors
    wrong = 'ValueError: NMS keeps the boxes [0] instead of [0, 2]'
    assert env.errors['torchvision.ops on cpu'] == wrong
    assert wrong in find_problems(env)[0][0]


def test_which_operators_are_in_use(monkeypatch):
    installed, operators = mmcv_ops.find_ext(), []
    for ext in (installed, importlib.util.find_spec('mmlinglo.mmcv_ops'), None):
        monkeypatch.setattr(mmcv_ops, 'find_ext', lambda ext=ext: ext)
        operators.append(check_env.collect().operators)
    assert operators[1] == 'stand-in by torchvision; work on: cpu'
    assert 'only where mmlinglo is imported before mmcv.ops' in operators[2]
    assert operators[0].startswith('compiled') == mmcv_ops.is_compiled(installed)


@pytest.mark.slow
def test_this_environment():
    result = run_check()
    assert result.returncode == 0, result.stdout
    assert re.search(r'^mmcv operators .*; work on: cpu$', result.stdout, re.MULTILINE)
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


@pytest.mark.parametrize(('package', 'kind'), [('mmengine', '-c'), ('mmcv', '-m')])
def test_a_missing_package_is_named_with_its_remedy(package, kind, tmp_path):
    code = f"import sys; sys.modules['{package}'] = None; from mmlinglo import LinGlo"
    (tmp_path / 'program').mkdir()
    (tmp_path / 'program/__init__.py').write_text(code)
    (tmp_path / 'program/__main__.py').touch()
    command = {'-c': code, '-m': 'program'}[kind]
    result = subprocess.run(
        [sys.executable, kind, command],
        env={'PYTHONPATH': f'{tmp_path}:{ROOT}'},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    expected = f'mmlinglo needs {package}, which is not installed: python -m pip install onedl-'
    assert expected in result.stderr


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

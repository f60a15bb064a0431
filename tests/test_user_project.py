# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""A repository outside the checkout uses the installed wheel through the toolboxes' own tools."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_ARCH

pytestmark = pytest.mark.slow
PROJECT = ROOT / 'docs/examples/detector_project'
# Drops an editable install of the checkout, which this Python may have.
NO_CHECKOUT = f"""
import sys
sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, '__name__', '') != '_EditableFinder']
sys.path[:] = [path for path in sys.path if path != {str(ROOT)!r}]
"""

# What a user would write, as small as the data.
CLASSIFIER = """
_base_ = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'
model = dict(
    backbone=dict(_delete_=True, type='mmlinglo.LinGlo', arch=ARCH),
    head=dict(num_classes=4, in_channels=32, topk=(1,)),
)
data_preprocessor = dict(num_classes=4)
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(64, 64)),
    dict(type='PackInputs'),
]
dataset = dict(
    _delete_=True, type='CustomDataset', data_root='data/shapes/imagenet', pipeline=pipeline
)
train_dataloader = dict(batch_size=8, num_workers=1, dataset=dict(data_prefix='train', **dataset))
val_dataloader = dict(batch_size=8, num_workers=1, dataset=dict(data_prefix='val', **dataset))
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1)
"""
# Its bases have paths: the maintained fork does not know `mmseg::`.
SEGMENTOR = """
_base_ = [
    'BASES/models/fpn_r50.py',
    'BASES/datasets/ade20k.py',
    'BASES/schedules/schedule_20k.py',
    'BASES/default_runtime.py',
]
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    pretrained=None,
    backbone=dict(_delete_=True, type='mmlinglo.LinGlo', arch=ARCH),
    neck=dict(in_channels=[8, 16, 24, 32]),
    decode_head=dict(num_classes=150),
)
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(64, 64)),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
dataset = dict(data_root='data/shapes/ade', pipeline=pipeline)
train_dataloader = dict(num_workers=1, dataset=dataset)
val_dataloader = dict(num_workers=1, dataset=dataset)
test_dataloader = val_dataloader
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=2))
"""


def run(*args, cwd, env, check=True) -> subprocess.CompletedProcess:
    result = subprocess.run(
        [str(arg) for arg in args], cwd=cwd, env=env, capture_output=True, text=True, timeout=900
    )
    if check and result.returncode:
        raise AssertionError(f'{args} ended with {result.returncode}:\n{result.stderr[-4000:]}')
    return result


def tool(package, name) -> Path:
    return Path(find_spec(package).submodule_search_locations[0]) / '.mim' / 'tools' / name


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
    """Environment variables under which mmlinglo is the wheel's, in a folder of its own."""
    folder = tmp_path_factory.mktemp('environment')
    (folder / 'clean').mkdir()
    (folder / 'clean/sitecustomize.py').write_text(NO_CHECKOUT)
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    env = {**os.environ, 'PATH': path, 'CUDA_VISIBLE_DEVICES': ''}
    env['PYTHONPATH'] = str(folder / 'clean')
    where = [sys.executable, '-c', 'import mmlinglo; print(mmlinglo.__file__)']
    without = run(*where, cwd=folder, env=env, check=False)
    assert "No module named 'mmlinglo'" in without.stderr

    # A copy, for a build leaves files behind.
    listed = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).split('\0'):
        if name and (ROOT / name).is_file():
            (folder / 'source' / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / 'source' / name)
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check']
    run(
        *pip, 'wheel', '--no-deps', '--no-build-isolation', '-w', folder, '.',
        cwd=folder / 'source', env=env,
    )  # fmt: skip
    (wheel,) = folder.glob('mmlinglo-*.whl')
    site = folder / 'site'
    run(*pip, 'install', '--no-deps', '--target', site, wheel, cwd=folder, env=env)
    shutil.rmtree(folder / 'source')
    env['PYTHONPATH'] = f'{folder / "clean"}{os.pathsep}{site}'
    assert run(*where, cwd=folder, env=env).stdout.strip() == str(site / 'mmlinglo/__init__.py')
    return env


@pytest.fixture(scope='module')
def project(environment, tmp_path_factory):
    """The example project, copied, after all commands of its README; and what they printed."""
    folder = tmp_path_factory.mktemp('users') / 'project'
    shutil.copytree(PROJECT, folder, ignore=shutil.ignore_patterns('__pycache__'))
    blocks = re.findall(r'^```bash\n(.*?)^```', (folder / 'README.md').read_text(), re.M | re.S)
    assert len(blocks) == 2
    result = run('bash', '-euo', 'pipefail', '-c', '\n'.join(blocks), cwd=folder, env=environment)
    return folder, result.stdout


def test_readme_of_the_example_project(project):
    folder, printed = project
    state = torch.load(folder / 'work_dirs/my_detector/epoch_1.pth', weights_only=False)
    weights = state['state_dict']
    assert state['meta']['iter'] == 4
    assert all(value.isfinite().all() for value in weights.values())
    assert weights['backbone.gates.0.conv1.conv.weight'].shape == (16, 64, 1, 1)
    biases = [weights[f'backbone.gates.{i}.conv2.conv.bias'] for i in range(3)]
    assert all(bias.abs().max() > 0 for bias in biases)  # they start from 0

    metrics = [
        json.loads(path.read_text().splitlines()[-1])
        for path in folder.glob('work_dirs/my_detector/*/*.json')
    ]
    assert any('coco/bbox_mAP' in each for each in metrics)
    assert re.search(r'^(disc|square|triangle|star) 0\.\d{3} at \[', printed, re.M)


def test_weights_of_linglo_start_the_subclass(project, environment):
    """`load_from`, as the README says: every tensor of LinGlo arrives in the subclass."""
    folder, _ = project
    env = {**environment, 'PYTHONPATH': f'{environment["PYTHONPATH"]}{os.pathsep}{folder}'}
    code = """
        import torch
        from mmengine.config import Config
        from mmengine.runner import Runner
        from mmlinglo import LinGlo

        linglo = LinGlo('b0', out_indices=(1, 2, 3))
        linglo.init_weights()
        weights = {'backbone.' + key: value for key, value in linglo.state_dict().items()}
        torch.save(dict(state_dict=weights), 'linglo.pth')
        cfg = Config.fromfile('configs/my_detector.py')
        cfg.update(load_from='linglo.pth', work_dir='work_dirs/loaded')
        runner = Runner.from_cfg(cfg)
        before = runner.model.state_dict()
        assert not all(torch.equal(before[key], value) for key, value in weights.items())
        runner.load_or_resume()
        after = runner.model.state_dict()
        assert all(torch.equal(after[key], value) for key, value in weights.items())
        print('all equal')
    """
    result = run(sys.executable, '-c', textwrap.dedent(code), cwd=folder, env=env)
    assert 'all equal' in result.stdout


@pytest.mark.parametrize(
    ('package', 'config', 'checkpoint', 'metric'),
    [
        ('mmpretrain', CLASSIFIER, 'epoch_1.pth', 'accuracy/top1'),
        ('mmseg', SEGMENTOR, 'iter_2.pth', 'mIoU'),
    ],
)
def test_train_and_test_of_the_other_toolboxes(
    package, config, checkpoint, metric, project, environment
):
    folder, _ = project
    path, work_dir = folder / f'configs/my_{package}.py', folder / f'work_dirs/{package}'
    bases = tool(package, '../configs/_base_').resolve()
    path.write_text(config.replace('BASES', str(bases)).replace('ARCH', str(TINY_ARCH)))
    common = dict(cwd=folder, env=environment)
    run(sys.executable, tool(package, 'train.py'), path, '--work-dir', work_dir, **common)
    args = [path, work_dir / checkpoint, '--work-dir', work_dir / 'test']
    run(sys.executable, tool(package, 'test.py'), *args, **common)
    (metrics,) = (work_dir / 'test').glob('*/*.json')
    assert metric in json.loads(metrics.read_text())

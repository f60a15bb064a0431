# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Mistakes end with one clear line, a non-zero status and no file left behind."""

import pytest
import torch
from conftest import ROOT, run_tool
from mmengine.config import Config
from trainings import write_tiny_config

from mmlinglo.models import ConditionalPositionalEncoding
from mmlinglo.utils.deploy import build_model

pytestmark = pytest.mark.slow
DETECTOR = ROOT / 'configs/quickstart/retinanet_linglo-b0_fpn_2xb4-3e_shapes.py'
CLASSIFIER = ROOT / 'configs/quickstart/linglo-b0_2xb16-8e_shapes.py'
CONVERT = 'tools/model_converters/reparameterize_model.py'


@pytest.fixture(scope='module')
def classifier_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp('cls') / 'classifier.pth'
    state = build_model(Config.fromfile(CLASSIFIER)).state_dict()
    torch.save({'meta': None, 'state_dict': state}, path)  # as a file of another program may be
    return path


def error_of(*args, **env):
    result = run_tool(*args, check=False, **env)
    assert result.returncode == 1, result.stderr
    assert 'Traceback' not in result.stderr
    line, _, more = result.stderr.partition('error: ')[2].strip().partition('\n')
    assert line, result.stderr
    assert '\n' not in more
    return f'error: {line}'


@pytest.mark.parametrize('tool', ['train', 'test', 'infer', 'reparameterize'])
def test_missing_config(tool, tmp_path):
    args = {
        'train': ['tools/train.py', 'nowhere.py', '--work-dir', tmp_path],
        'test': ['tools/test.py', 'nowhere.py', 'x.pth', '--work-dir', tmp_path],
        'infer': ['tools/infer.py', 'nowhere.py', 'x.pth', tmp_path, '--out-dir', tmp_path / 'out'],
        'reparameterize': [CONVERT, 'nowhere.py', 'x.pth', tmp_path / 'out.pth'],
    }[tool]
    assert error_of(*args).startswith("error: config 'nowhere.py' not found")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('model = dict(', 'SyntaxError'),
        ("_base_ = 'absent.py'", 'absent.py'),
        ('x = 1', 'lacks model and default_scope'),
    ],
)
def test_wrong_config(content, message, tmp_path):
    (tmp_path / 'config.py').write_text(content)
    line = error_of('tools/train.py', tmp_path / 'config.py', '--work-dir', tmp_path / 'work')
    assert 'config.py' in line
    assert message in line
    assert not (tmp_path / 'work').exists()


def test_misspelt_model(shapes, tmp_path):
    config = write_tiny_config(tmp_path, shapes, 'detection')
    args = ['--work-dir', tmp_path, '--cfg-options', 'model.backbone.type=LinGol']
    assert 'LinGol is not in the mmdet::model registry' in error_of('tools/train.py', config, *args)


def test_missing_data(tmp_path):
    args = [
        '--work-dir',
        tmp_path,
        '--cfg-options',
        f'train_dataloader.dataset.data_root={tmp_path}/no/',
    ]
    assert f'{tmp_path}/no/annotations/train.json' in error_of('tools/train.py', DETECTOR, *args)


def test_amp_without_a_gpu(shapes, tmp_path):
    config = write_tiny_config(tmp_path, shapes, 'detection')
    args = [config, '--work-dir', tmp_path / 'work', '--amp']
    assert '--amp needs a GPU' in error_of('tools/train.py', *args)


def test_missing_checkpoint(tmp_path):
    expected = f"error: checkpoint '{tmp_path}/no.pth' not found"
    assert error_of('tools/test.py', DETECTOR, tmp_path / 'no.pth') == expected
    assert error_of(CONVERT, DETECTOR, tmp_path / 'no.pth', tmp_path / 'out.pth') == expected
    assert not list(tmp_path.iterdir())


def test_checkpoint_of_another_model(classifier_checkpoint, tmp_path):
    out = tmp_path / 'out.pth'
    line = error_of(CONVERT, DETECTOR, classifier_checkpoint, out)
    assert 'does not fit this model' in line
    assert 'tensors missing: backbone.norm1' in line
    arch = ['--cfg-options', 'model.backbone.arch=b1', 'model.head.in_channels=512']
    line = error_of(CONVERT, CLASSIFIER, classifier_checkpoint, out, *arch)
    assert 'of another shape' in line
    assert '(32, 3, 7, 7) instead of (64, 3, 7, 7)' in line
    assert not list(tmp_path.iterdir())


def test_converting_twice_or_in_place(classifier_checkpoint, tmp_path):
    out = tmp_path / 'out.pth'
    assert 'is the checkpoint itself' in error_of(
        CONVERT, CLASSIFIER, classifier_checkpoint, classifier_checkpoint
    )
    run_tool(CONVERT, CLASSIFIER, classifier_checkpoint, out)
    assert 're-parameterised' in error_of(CONVERT, CLASSIFIER, out, tmp_path / 'again.pth')
    deployed = ['--cfg-options', 'model.backbone.deploy=True']
    assert 'already builds the deployed form' in error_of(
        CONVERT, CLASSIFIER, out, tmp_path / 'again.pth', *deployed
    )
    assert [p.name for p in tmp_path.iterdir()] == ['out.pth']


def test_converting_a_model_without_another_form(tmp_path):
    backbone = dict(type='ResNet', depth=18, stem_channels=8, base_channels=8)
    model = dict(type='ImageClassifier', backbone=backbone)
    cfg = Config(dict(default_scope='mmpretrain', model=model))
    cfg.dump(tmp_path / 'resnet.py')
    torch.save({'state_dict': build_model(cfg).state_dict()}, tmp_path / 'resnet.pth')
    line = error_of(CONVERT, *(tmp_path / f'resnet.{x}' for x in ('py', 'pth')), tmp_path / 'out')
    assert 'has no part that can be re-parameterised' in line
    assert not (tmp_path / 'out').exists()


def test_a_wrong_fusion_is_refused(classifier_checkpoint, tmp_path, monkeypatch):
    import importlib.util
    import sys

    spec = importlib.util.spec_from_file_location('reparameterize_model', ROOT / CONVERT)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    right = ConditionalPositionalEncoding.fused_kernel_and_bias

    def wrong(self):
        kernel, bias = right(self)
        return kernel * 1.01, bias

    monkeypatch.setattr(ConditionalPositionalEncoding, 'fused_kernel_and_bias', wrong)
    out = tmp_path / 'out.pth'
    monkeypatch.setattr(
        sys, 'argv', ['tool', str(CLASSIFIER), str(classifier_checkpoint), str(out)]
    )
    with pytest.raises(tool.CheckpointError, match='nothing was written'):
        tool.main()
    assert not list(tmp_path.iterdir())


def test_out_of_the_wrong_kind(classifier_checkpoint, tmp_path):
    line = error_of(
        'tools/test.py', CLASSIFIER, classifier_checkpoint, '--out', tmp_path / 'folder'
    )
    assert '--out must be a .pkl file' in line


@pytest.mark.parametrize('script', ['dist_train', 'dist_test', 'slurm_train', 'slurm_test'])
def test_launchers_without_arguments_print_their_usage(script):
    result = run_tool(f'tools/{script}.sh', check=False)
    assert result.returncode == 2
    assert f'bash tools/{script}.sh' in result.stderr


def test_quickstart_of_an_unknown_task():
    result = run_tool('tools/quickstart.sh', 'juggling', check=False)
    assert result.returncode == 2
    assert 'detection|segmentation|classification' in result.stderr

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import importlib.util
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT, needs_exporter, randomize_norms_, run_tool
from mmengine.config import Config

from mmlinglo.models import ConditionalPositionalEncoding
from mmlinglo.utils.cli import UsageError
from mmlinglo.utils.deploy import build_model

TOOL = 'tools/deployment/export_onnx.py'
TINY = """
arch = dict(embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2), mlp_ratio=(2, 2))
"""
CLASSIFIER = (
    TINY
    + f"""
_base_ = '{ROOT}/configs/quickstart/linglo-b0_2xb16-8e_shapes.py'
model = dict(backbone=dict(arch=dict(_delete_=True, **arch), out_indices=(1,)), head=dict(in_channels=16))
"""
)
DETECTOR = (
    TINY
    + f"""
_base_ = '{ROOT}/configs/coco/retinanet_linglo-b0_fpn_1x_coco.py'
model = dict(
    backbone=dict(arch=dict(_delete_=True, **arch), out_indices=(0, 1)),
    neck=dict(in_channels=[8, 16]),
)
"""
)


@pytest.fixture
def classifier(tmp_path):
    """Config and checkpoint of a very small classifier, and the model in evaluation mode."""
    config = tmp_path / 'classifier.py'
    config.write_text(CLASSIFIER)
    model = randomize_norms_(build_model(Config.fromfile(config))).eval()
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'classifier.pth')
    return config, tmp_path / 'classifier.pth', model


@pytest.fixture
def main(monkeypatch):
    """The tool's main() in this process, with arguments."""
    spec = importlib.util.spec_from_file_location('export_onnx', ROOT / TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def call(*args):
        monkeypatch.setattr(sys, 'argv', ['export_onnx.py', *map(str, args)])
        tool.main()

    call.tool = tool
    return call


def run_file(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {'images': images.numpy()})))


def test_logits_of_a_classifier(classifier, main, tmp_path, capsys):
    config, checkpoint, model = classifier
    out = tmp_path / 'onnx/classifier.onnx'
    main(config, checkpoint, '--out', out, '--part', 'model', '--shape', 40, 48)
    assert 'with classifier.pth weights, outputs logits' in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ['classifier.onnx']
    images = torch.randn(1, 3, 40, 48)
    with torch.no_grad():
        expected = model(images, mode='tensor')
    np.testing.assert_allclose(run_file(out, images)['logits'], expected, rtol=1e-4, atol=1e-5)
    content = onnx.load(out)
    onnx.checker.check_model(content, full_check=True)
    metadata = {p.key: p.value for p in content.metadata_props}
    assert metadata['mean'] == '[123.675, 116.28, 103.53]'
    assert metadata['std'] == '[58.395, 57.12, 57.375]'
    assert metadata['channel_order'] == 'RGB'
    assert metadata['weights'] == 'classifier.pth'


@needs_exporter
def test_another_opset(classifier, main, tmp_path):
    config, checkpoint, _ = classifier
    out = tmp_path / 'classifier.onnx'
    main(config, checkpoint, '--out', out, '--shape', 32, 32, '--opset', 19)
    opsets = onnx.load(out).opset_import
    assert [opset.version for opset in opsets if not opset.domain] == [19]


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--dynamic'], 'fixes sizes that must stay free: export one file for each size'),
        (['--opset', 19], 'writes opset 18 when asked for 19: leave the opset out'),
    ],
)
def test_an_exporter_that_ignores_what_it_is_asked_for(
    classifier, main, tmp_path, monkeypatch, args, message
):
    export = torch.onnx.export

    def as_in_torch_2_5(*args, **kwargs):
        return export(*args, **{**kwargs, 'dynamic_shapes': None, 'opset_version': 18})

    monkeypatch.setattr(torch.onnx, 'export', as_in_torch_2_5)
    out = tmp_path / 'onnx/classifier.onnx'
    with pytest.raises(UsageError, match=message):
        main(classifier[0], '--out', out, '--shape', 64, 64, *args)
    assert not list(out.parent.iterdir())


@needs_exporter
@pytest.mark.slow
def test_backbone_of_a_detector_at_any_size(tmp_path):
    config, out = tmp_path / 'detector.py', tmp_path / 'detector.onnx'
    config.write_text(DETECTOR)
    result = run_tool(TOOL, config, '--out', out, '--dynamic', '--shape', 64, 96)
    assert 'backbone with random weights, outputs stage0, stage1' in result.stdout
    assert 'on 2x3x64x96 and 1x3x109x73' in result.stdout
    outputs = run_file(out, torch.randn(3, 3, 65, 130))
    assert {name: value.shape for name, value in outputs.items()} == dict(
        stage0=(3, 8, 17, 33), stage1=(3, 16, 9, 17)
    )


@pytest.mark.slow
def test_a_wrong_file_is_refused(classifier, main, tmp_path, monkeypatch):
    config, checkpoint, _ = classifier
    right = ConditionalPositionalEncoding.fused_kernel_and_bias

    def wrong(self):
        kernel, bias = right(self)
        return kernel * 1.01, bias

    monkeypatch.setattr(ConditionalPositionalEncoding, 'fused_kernel_and_bias', wrong)
    out = tmp_path / 'onnx/classifier.onnx'
    with pytest.raises(main.tool.CheckpointError, match='nothing was written'):
        main(config, checkpoint, '--out', out, '--shape', 32, 32)
    assert not list(out.parent.iterdir())


@needs_exporter
@pytest.mark.slow
def test_nan_at_any_size_is_refused(classifier, main, tmp_path, monkeypatch):
    config, checkpoint, _ = classifier
    run_onnx = main.tool.export.run_onnx

    def nan_at_the_second_size(file, images):
        maps = run_onnx(file, images)
        return [*maps[:-1], maps[-1] * torch.nan] if len(images) == 1 else maps

    monkeypatch.setattr(main.tool.export, 'run_onnx', nan_at_the_second_size)
    out = tmp_path / 'onnx/classifier.onnx'
    with pytest.raises(main.tool.CheckpointError, match=r'by nan of .* nothing was written'):
        main(config, checkpoint, '--out', out, '--shape', 64, 96, '--dynamic')
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--out', 'x.pth'], r"file \*\.onnx, got 'x\.pth'"),
        (['--out', 'x.onnx', '--shape', 31, 64], r'at least 32 32 .* got \[31, 64\] and 1'),
        (['--out', 'x.onnx', '--shape', 32, 64, '--dynamic'], 'at least 64 64'),
        (
            ['--out', 'x.onnx', '--batch-size', 0],
            r'--batch-size at least 1, got \[224, 224\] and 0',
        ),
    ],
)
def test_bad_arguments(classifier, main, args, message):
    with pytest.raises(UsageError, match=message):
        main(classifier[0], *args)


def test_whole_detectors_are_not_for_this_tool(main, tmp_path):
    config = tmp_path / 'detector.py'
    config.write_text(DETECTOR)
    with pytest.raises(UsageError, match=r'belongs to mmdet: use --part backbone, or see docs/'):
        main(config, '--out', tmp_path / 'x.onnx', '--part', 'model')


def test_a_missing_package(classifier, main, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(UsageError, match='onnxscript is missing: pip install onnx onnxscript'):
        main(classifier[0], '--out', tmp_path / 'x.onnx')


def test_opsets_are_listed(main, classifier, capsys):
    with pytest.raises(SystemExit):
        main(classifier[0], '--out', 'x.onnx', '--opset', 17)
    assert '18, 19, 20, 21, 22, 23' in capsys.readouterr().err


def test_a_checkpoint_of_another_model(classifier, main, tmp_path):
    torch.save({'state_dict': {'weight': torch.zeros(1)}}, tmp_path / 'other.pth')
    out = tmp_path / 'x.onnx'
    with pytest.raises(main.tool.CheckpointError, match='does not fit this model'):
        main(classifier[0], tmp_path / 'other.pth', '--out', out)
    assert not out.exists()

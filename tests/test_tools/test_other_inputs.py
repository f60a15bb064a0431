# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Every tool that runs a model: images of four channels, and backbones that mask the padding."""

import json

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
from conftest import import_tool
from mmengine.dataset import Compose, pseudo_collate
from test_infer import CONFIGS, run_main, tiny_config, write

from mmlinglo.utils.cli import UsageError
from mmlinglo.utils.deploy import build_model

CHANNELS = 4


def read_unchanged(cfg) -> None:
    """Let the config's loader keep the alpha channel, as its user would write it."""
    backbone = cfg.model.backbone
    backbone.in_channels = CHANNELS
    settings = dict(mean=[110.0], std=[60.0])  # mmengine takes one value or three
    for where in (cfg.model, cfg):
        if 'data_preprocessor' in where:
            where.data_preprocessor.update(settings)
            for key in ('bgr_to_rgb', 'to_rgb'):
                if key in where.data_preprocessor:
                    where.data_preprocessor[key] = False
    for step in cfg.test_dataloader.dataset.pipeline:
        if step.type == 'LoadImageFromFile':
            step.color_type = 'unchanged'


def rgba(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return cv2.GaussianBlur(rng.integers(0, 256, (96, 128, 4), dtype=np.uint8), (0, 0), 3)


@pytest.fixture(params=CONFIGS)
def experiment(request, tmp_path):
    """Task, config, checkpoint, and the model, of four channels."""
    cfg = tiny_config(request.param)
    read_unchanged(cfg)
    model = build_model(cfg)
    model.init_weights()
    for parameter in model.backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    names = ('background',) * (request.param == 'segmentation')
    meta = dict(classes=(*names, 'disc', 'square', 'triangle', 'star'))
    state = dict(state_dict=model.state_dict(), meta=dict(dataset_meta=meta))
    torch.save(state, tmp_path / 'model.pth')
    cfg.dump(tmp_path / 'config.py')
    return request.param, tmp_path / 'config.py', tmp_path / 'model.pth', model.eval()


def test_predictions_use_the_loader_of_the_config(experiment, tmp_path):
    task, config, checkpoint, model = experiment
    write(tmp_path / 'in/a.png', rgba(0))
    other = rgba(0)
    other[..., 3] = 255 - other[..., 3]  # an image that differs in its alpha channel only
    write(tmp_path / 'in/b.png', other)
    run_main(config, checkpoint, tmp_path / 'in', '--out-dir', tmp_path / 'out')
    found = {
        name: json.loads((tmp_path / f'out/preds/{name}.png.json').read_text()) for name in 'ab'
    }
    cfg = tiny_config(task)
    read_unchanged(cfg)
    steps = [s for s in cfg.test_dataloader.dataset.pipeline if 'Annotations' not in s.type]
    scores = []
    for name in 'ab':
        data = Compose(steps)(dict(img_path=str(tmp_path / f'in/{name}.png'), img_id=0))
        assert data['inputs'].shape[0] == CHANNELS
        with torch.no_grad():
            sample = model.test_step(pseudo_collate([data]))[0]
        if task == 'detection':
            scores.append(sample.pred_instances.scores.tolist())
            assert found[name]['scores'] == pytest.approx(scores[-1], abs=1e-5)
        elif task == 'classification':
            scores.append(sample.pred_score.tolist())
            assert found[name]['pred_scores'] == pytest.approx(scores[-1], abs=1e-5)
        else:
            labels = sample.pred_sem_seg.data[0].numpy()
            scores.append(labels.tolist())
            file = tmp_path / 'out/preds' / found[name]['label_image']
            assert (cv2.imread(str(file), cv2.IMREAD_UNCHANGED) == labels).mean() > 0.999
    assert scores[0] != scores[1]
    assert cv2.imread(str(tmp_path / 'out/vis/a.png')).shape[2] == 3


def test_a_video_cannot_have_four_channels(experiment, tmp_path):
    _, config, checkpoint, _ = experiment
    writer = cv2.VideoWriter(str(tmp_path / 'a.mp4'), cv2.VideoWriter_fourcc(*'mp4v'), 10, (64, 64))
    writer.write(np.zeros((64, 64, 3), np.uint8))
    writer.release()
    with pytest.raises(UsageError, match='takes images of 4 channels, videos have 3'):
        run_main(config, checkpoint, tmp_path / 'a.mp4', '--out-dir', tmp_path / 'out')


def test_other_tools(experiment, tmp_path, capsys):
    task, config, checkpoint, model = experiment
    options = []
    if task != 'classification':  # has no padding
        options = ['--cfg-options', 'model.backbone.mask_padding=True']
    images = torch.randn(1, CHANNELS, 96, 128)
    with torch.no_grad():
        expected = model.backbone(images)
    files = [str(config), str(checkpoint)]
    deployed = tmp_path / 'deployed.pth'
    tool = import_tool('tools/model_converters/reparameterize_model.py')
    assert tool.main([*files, str(deployed), *options]) == 0
    cfg = tiny_config(task)
    read_unchanged(cfg)
    cfg.model.backbone.deploy = True
    twin = build_model(cfg).eval()
    twin.load_state_dict(torch.load(deployed)['state_dict'])
    with torch.no_grad():
        for found, reference in zip(twin.backbone(images), expected):
            torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-4)

    tool = import_tool('tools/analysis_tools/get_complexity.py')
    shape = ['--shape', '96', '128']
    assert tool.main([files[0], '--out', str(tmp_path / 'c'), *shape, *options]) == 0
    rows = json.loads((tmp_path / 'c.json').read_text())['rows']
    keys = ('training', 'total', 'all')
    total = next(row for row in rows if (row['form'], row['part'], row['operator']) == keys)
    assert total['params_m'] == sum(p.numel() for p in model.parameters()) / 1e6

    if task == 'segmentation':  # takes long
        onnx = tmp_path / 'backbone.onnx'
        tool = import_tool('tools/deployment/export_onnx.py')
        assert tool.main([*files, '--out', str(onnx), *shape, *options]) == 0
        session = onnxruntime.InferenceSession(str(onnx), providers=['CPUExecutionProvider'])
        for found, reference in zip(session.run(None, {'images': images.numpy()}), expected):
            torch.testing.assert_close(torch.from_numpy(found), reference, rtol=1e-3, atol=1e-3)
    capsys.readouterr()


def test_saliency(experiment, tmp_path):
    _, config, checkpoint, _ = experiment
    write(tmp_path / 'a.png', rgba(0))
    tool = import_tool('tools/visualization/vis_saliency.py')
    args = [config, checkpoint, tmp_path / 'a.png', '--out-dir', tmp_path, '--device', 'cpu']
    assert tool.main(list(map(str, args))) == 0
    assert cv2.imread(str(tmp_path / 'a_saliency.png')).size > 0

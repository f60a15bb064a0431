# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Each recipe is found by its name, with the counts of the network that it builds."""

import importlib.util
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, run_tool
from mmengine.config import Config

import mmlinglo
from mmlinglo.utils import CheckpointError
from mmlinglo.utils.deploy import build_model

METAFILES = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
MODELS = [m for f in METAFILES for m in yaml.safe_load((ROOT / f).read_text())['Models']]
TASKS = ('imagenet', 'coco', 'ade20k')
BASIC = [
    'linglo-b0_8xb128_in1k',
    'retinanet_linglo-b0_fpn_1x_coco',
    'mask-rcnn_linglo-b0_fpn_1x_coco',
    'fpn_linglo-b0_8xb4-40k_ade20k-512x512',
]
UPDATE = 'tools/misc/update_model_zoo.py'


def model_zoo_tool():
    spec = importlib.util.spec_from_file_location('update_model_zoo', ROOT / UPDATE)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_every_recipe_has_one_row():
    names = [model['Name'] for model in MODELS]
    recipes = [path for task in TASKS for path in (ROOT / 'configs' / task).glob('*.py')]
    assert sorted(names) == sorted(path.stem for path in recipes)
    assert {ROOT / model['Config'] for model in MODELS} == set(recipes)
    assert set(BASIC) <= set(names)


@pytest.mark.parametrize('name', BASIC)
def test_counts_are_recomputed(name):
    row = next(model['Metadata'] for model in MODELS if model['Name'] == name)
    cfg = mmlinglo.get_config(name)
    counts = model_zoo_tool().counts(cfg)
    assert {key: row[key] for key in counts} == counts
    for key, deploy in (('Parameters', False), ('Deployed Parameters', True)):
        cfg.model.backbone.deploy = deploy
        assert sum(p.numel() for p in build_model(cfg).parameters()) == row[key]


@pytest.mark.slow
def test_all_rows_and_tables_are_up_to_date():
    assert 'up to date' in run_tool(UPDATE, '--check').stdout


def test_check_names_what_is_not_up_to_date(monkeypatch, capsys):
    tool = model_zoo_tool()
    files = [ROOT / path for path in ('configs/imagenet/metafile.yml', 'docs/model_zoo.md')]
    before = [path.read_text() for path in files]
    counted = {model['Config']: model['Metadata'] for model in MODELS}

    def counts(cfg, wrong=()):
        config = Path(cfg.filename).resolve().relative_to(ROOT).as_posix()
        return {**counted[config], **dict.fromkeys(wrong, 10**9)}

    monkeypatch.setattr(sys, 'argv', [UPDATE, '--check'])
    monkeypatch.setattr(tool, 'counts', counts)
    tool.main()
    assert capsys.readouterr().out == 'everything is up to date\n'

    def wrong_b0(cfg):
        return counts(cfg, ['FLOPs'] if cfg.filename.endswith('/linglo-b0_8xb128_in1k.py') else [])

    monkeypatch.setattr(tool, 'counts', wrong_b0)
    names = r'configs/imagenet/metafile\.yml, docs/model_zoo\.md, configs/imagenet/README\.md'
    with pytest.raises(tool.UsageError, match=f'not up to date: {names}. Run python {UPDATE}'):
        tool.main()
    assert [path.read_text() for path in files] == before


def test_tables_are_those_of_the_metafiles_and_docstrings():
    tool = model_zoo_tool()
    rows = {task: [m for m in MODELS if f'/{task}/' in m['Config']] for task in TASKS}
    documents = tool.updated_documents(rows)
    assert {path for path, text in documents.items() if path.read_text() != text} == set()
    readmes = {path.parent / 'README.md' for path in (ROOT / 'configs').glob('[!_]*/*.py')}
    assert set(documents) == {tool.ZOO, *readmes}
    for config in (ROOT / 'configs').glob('[!_]*/*.py'):
        text = (config.parent / 'README.md').read_text()
        assert f'[{config.stem}]({config.name})' in text
    for model in MODELS:
        counts = model['Metadata']
        text = tool.ZOO.read_text()
        line = next(line for line in text.splitlines() if f'[{model["Name"]}]' in line)
        assert f'({"../" + model["Config"]})' in line
        params = [counts[key] / 1e6 for key in ('Parameters', 'Deployed Parameters')]
        assert '{:.2f} / {:.2f} M'.format(*params) in line


def test_tables_need_their_place():
    tool = model_zoo_tool()
    with pytest.raises(tool.UsageError, match=r'zoo\.md must have one line "<!-- table: moon -->"'):
        tool.with_tables(tool.ZOO, {'moon': ''})


def test_what_is_kept_by_hand_survives_an_update(monkeypatch):
    tool = model_zoo_tool()
    monkeypatch.setattr(tool, 'counts', lambda _: {'Parameters': 1})
    path = ROOT / 'configs/imagenet/linglo-b0_8xb128_in1k.py'
    new = tool.updated_row(path, {})
    assert new['Results'] == [
        {'Task': 'Image Classification', 'Dataset': 'ImageNet-1k', 'Metrics': None}
    ]
    by_hand = {
        'Weights': 'https://example.org/x.pth',
        'Results': [{**new['Results'][0], 'Metrics': {'Top 1 Accuracy': 12.34}}],
        'Metadata': {'Top 1 Accuracy in the Paper': 72.5, 'Parameters': 0},
    }
    row = tool.updated_row(path, by_hand)
    assert row['Weights'] == by_hand['Weights']
    assert row['Results'] == by_hand['Results']
    assert row['Metadata'] == {
        'Top 1 Accuracy in the Paper': 72.5,
        'Training Data': 'ImageNet-1k',
        'Parameters': 1,
    }


@pytest.mark.parametrize('document', ['README.md', 'docs/reproduction.md'])
def test_parameters_in_the_documents(document):
    """Cells such as `3.81 / 3.60 M` beside a link to a config."""
    counts = {Path(model['Config']).name: model['Metadata'] for model in MODELS}
    found = 0
    for line in (ROOT / document).read_text().splitlines():
        config = re.search(r'configs/(?:imagenet|coco|ade20k)/([^)/]+\.py)\)', line)
        cell = re.search(r'\| ([\d.]+) / ([\d.]+) M \|', line)
        if line.startswith('|') and config and cell:
            row = counts[config[1]]
            for printed, key in zip(cell.groups(), ('Parameters', 'Deployed Parameters')):
                assert float(printed) == pytest.approx(row[key] / 1e6, abs=0.005001), line
            found += 1
    assert found >= 9 or document != 'README.md'


def test_model_index_reads_the_files_without_complaint():
    """The package that mim and mmpretrain read them with."""
    from modelindex.load_model_index import load

    index = load(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    assert [model.name for model in index.models] == [model['Name'] for model in MODELS]
    for model in index.models:
        assert model.full_model.paper['URL'] == 'https://arxiv.org/abs/2207.00188'
        assert model.metadata.data['FLOPs'] > model.metadata.data['Deployed FLOPs'] > 0
        assert model.weights is None


def test_names():
    assert mmlinglo.list_models() == sorted(model['Name'] for model in MODELS)
    assert mmlinglo.list_models('*_linglo-b1_fpn_1x') == [
        'faster-rcnn_linglo-b1_fpn_1x_coco',
        'mask-rcnn_linglo-b1_fpn_1x_coco',
        'retinanet_linglo-b1_fpn_1x_coco',
    ]
    assert mmlinglo.list_models('resnet') == []
    cfg = mmlinglo.get_config('retinanet_linglo-b1_fpn_1x_coco')
    assert Path(cfg.filename).samefile(ROOT / 'configs/coco/retinanet_linglo-b1_fpn_1x_coco.py')
    assert cfg.model.backbone.arch == 'b1'
    similar = r"no recipe is named 'retinanet_linglo-b1'\. Did you mean 'retinanet_linglo-b"
    with pytest.raises(ValueError, match=similar):
        mmlinglo.get_config('retinanet_linglo-b1')
    with pytest.raises(ValueError, match=r"no recipe is named 'x'\. mmlinglo\.list_models"):
        mmlinglo.get_config('x')


def test_models_by_name_load_whole_or_not_at_all(tmp_path):
    name = 'linglo-b0_8xb128_in1k'
    model = mmlinglo.get_model(name)
    assert not model.training
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'whole.pth')
    torch.save({'state_dict': model.backbone.state_dict()}, tmp_path / 'part.pth')
    again = mmlinglo.get_model(name, pretrained=str(tmp_path / 'whole.pth'))
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    with pytest.raises(CheckpointError, match='does not fit this model'):
        mmlinglo.get_model(name, pretrained=str(tmp_path / 'part.pth'))
    with pytest.raises(ValueError, match=f"nobody has published weights of '{name}'"):
        mmlinglo.get_model(name, pretrained=True)


def test_mmpretrain_knows_the_classifiers():
    """Whether it is imported before or after; the second process is a fork of the first."""
    code = """
import os, sys, warnings
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
    import mmpretrain
    import mmlinglo
else:
    before = list(sys.meta_path)
    import mmlinglo
    assert sys.meta_path == before
    assert 'mmpretrain' not in sys.modules
mmlinglo.register_in_mmpretrain()
import mmpretrain
names = mmpretrain.list_models('linglo*')
assert names == mmlinglo.list_models('linglo'), names
if child == 0:
    print('found', flush=True)
    os._exit(0)
from mmpretrain.apis import ImageClassificationInferencer
assert names == mmpretrain.list_models('linglo', task='Image Classification')
assert len(mmpretrain.list_models()) > 500
model = mmpretrain.get_model('linglo-b1_8xb128_in1k', backbone=dict(out_indices=(0, 3)))
assert type(model.backbone) is mmlinglo.LinGlo and model.backbone.arch['embed_dims'][0] == 64
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    mmpretrain.get_model('linglo-b0_8xb128_in1k', pretrained=True)
assert any('Unable to find pre-defined checkpoint' in str(w.message) for w in caught)
inferencer = ImageClassificationInferencer('linglo-b0_8xb128_in1k', pretrained=False)
assert inferencer.config.model.head.num_classes == 1000
mmlinglo.register_in_mmpretrain()  # a second time
print('found')
"""
    result = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, timeout=300
    )
    assert result.stdout.splitlines()[-1:] == ['found'], result.stderr
    assert result.stdout.splitlines().count('found') == 2, result.stderr


@pytest.mark.parametrize(
    ('toolbox', 'name'),
    [
        ('mmdet', 'retinanet_linglo-b0_fpn_1x_coco'),
        ('mmseg', 'fpn_linglo-b0_8xb4-40k_ade20k-512x512'),
        ('mmpretrain', 'linglo-b0_8xb128_in1k'),
    ],
)
def test_inferencers_take_a_config_by_name(toolbox, name, tmp_path):
    cfg = mmlinglo.get_config(name)
    if toolbox != 'mmpretrain':  # smaller pictures than the recipe's
        for step in cfg.test_dataloader.dataset.pipeline:
            if step.type == 'Resize':
                step.scale = (64, 64)
    model = build_model(cfg)
    checkpoint = tmp_path / 'weights.pth'
    classes = [f'class {i}' for i in range({'mmdet': 80, 'mmseg': 150}.get(toolbox, 1000))]
    meta = dict(
        dataset_meta=dict(classes=classes, palette=[[i, i, i] for i in range(len(classes))])
    )
    torch.save({'state_dict': model.state_dict(), 'meta': meta}, checkpoint)
    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if toolbox == 'mmdet':
            from mmdet.apis import DetInferencer

            inferencer = DetInferencer(cfg, str(checkpoint), device='cpu')
            (prediction,) = inferencer(picture, no_save_vis=True)['predictions']
            assert set(prediction) >= {'bboxes', 'labels', 'scores'}
        elif toolbox == 'mmseg':
            from mmseg.apis import MMSegInferencer

            inferencer = MMSegInferencer(cfg, str(checkpoint), device='cpu')
            assert inferencer(picture)['predictions'].shape == (48, 64)
        else:
            from mmpretrain.apis import ImageClassificationInferencer

            inferencer = ImageClassificationInferencer(
                cfg, pretrained=str(checkpoint), device='cpu'
            )
            (prediction,) = inferencer(picture)
            assert prediction['pred_class'] == f'class {prediction["pred_label"]}'
    key = 'backbone.stages.0.blocks.0.attn.saliency'
    assert torch.equal(inferencer.model.state_dict()[key], model.state_dict()[key])
    assert type(inferencer.model.backbone) is mmlinglo.LinGlo
    assert isinstance(inferencer.model.cfg if toolbox != 'mmpretrain' else cfg, Config)

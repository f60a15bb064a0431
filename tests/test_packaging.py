# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import subprocess
import sys
import zipfile

import pytest
import yaml
from conftest import ROOT
from mmengine.config import Config

from mmlinglo import __version__
from mmlinglo.utils.deploy import build_model

METAFILES = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
MODELS = [m for f in METAFILES for m in yaml.safe_load((ROOT / f).read_text())['Models']]


@pytest.mark.parametrize('model', MODELS, ids=lambda model: model['Name'])
def test_metafile_numbers_are_recomputed(model):
    cfg = Config.fromfile(ROOT / model['Config'])
    assert cfg.filename.endswith(f'/{model["Name"]}.py')
    metadata = model['Metadata']
    for key, deploy in (('Parameters', False), ('Parameters (deployed)', True)):
        cfg.model.backbone.deploy = deploy
        assert sum(p.numel() for p in build_model(cfg).parameters()) == metadata[key]


def test_every_recipe_is_in_the_index():
    recipes = {
        path.stem
        for task in ('imagenet', 'coco', 'ade20k')
        for path in (ROOT / 'configs' / task).glob('*.py')
    }
    assert recipes == {model['Name'] for model in MODELS}


def test_mmpretrain_reads_the_index():
    from mmpretrain.apis.model import ModelHub

    ModelHub.register_model_index(ROOT / 'model-index.yml', config_prefix=ROOT)
    assert ModelHub.has('linglo-b1_8xb128_in1k')
    assert ModelHub.get('linglo-b1_8xb128_in1k').config.model.backbone.arch == 'b1'


@pytest.mark.slow
def test_wheel_holds_configs_and_tools_for_mim(tmp_path):
    source = tmp_path / 'source'
    subprocess.run(['git', 'clone', '-q', ROOT, source], check=True)
    command = ['pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', tmp_path, source]
    subprocess.run([sys.executable, '-m', *command], check=True)
    wheel = tmp_path / f'mmlinglo-{__version__}-py3-none-any.whl'
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / 'site')
    mim = tmp_path / 'site/mmlinglo/.mim'
    assert (mim / 'model-index.yml').is_file()
    assert (mim / 'tools/train.py').is_file()
    assert (mim / 'tools/dist_train.sh').is_file()
    for model in MODELS:
        assert Config.fromfile(mim / model['Config']).model.backbone.type == 'mmlinglo.LinGlo'
    code = 'import mmlinglo; print(mmlinglo.__file__, len(mmlinglo.LinGlo("b0").stages))'
    result = subprocess.run(
        [sys.executable, '-c', code],
        env={'PYTHONPATH': str(tmp_path / 'site')},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert result.stdout.split() == [str(tmp_path / 'site/mmlinglo/__init__.py'), '4']

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT
from mmengine.config import Config
from test_metafiles import MODELS

from mmlinglo import LinGlo, __version__


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
        backbone = Config.fromfile(mim / model['Config']).model.backbone
        assert backbone.type in ('mmlinglo.LinGlo', LinGlo)  # a class in pure Python configs
    code = (
        'import mmlinglo as m; config = m.get_config("linglo-b1_8xb128_in1k");'
        'print(m.__file__, len(m.LinGlo("b0").stages), config.filename, len(m.list_models()))'
    )
    result = subprocess.run(
        [sys.executable, '-c', code],
        env={'PYTHONPATH': str(tmp_path / 'site')},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    config = mim / 'configs/imagenet/linglo-b1_8xb128_in1k.py'
    expected = [tmp_path / 'site/mmlinglo/__init__.py', 4, config, len(MODELS)]
    assert result.stdout.split() == [str(item) for item in expected]

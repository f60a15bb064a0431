# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The wheel, and how the stand-in for mmcv's operators gets into an environment."""

import importlib.machinery
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import mmcv
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
    for_developers = ('update_model_zoo', 'run_tests', 'setup_env', 'quickstart')
    assert not [path for path in (mim / 'tools').rglob('*') if path.stem in for_developers]
    script = mim / 'tools/dist_train.sh'
    help_text = subprocess.check_output(['bash', script, '--help'], text=True)
    assert help_text.startswith('bash tools/dist_train.sh CONFIG GPUS')
    for gpus in ('two', '0', '--work-dir'):
        wrong = subprocess.run(['bash', script, 'x.py', gpus], capture_output=True, text=True)
        assert (wrong.returncode, wrong.stderr) == (2, help_text)
    assert (tmp_path / 'site/mmlinglo/py.typed').is_file()
    (folder,) = (tmp_path / 'site').glob('*.dist-info')
    metadata = PathDistribution(folder).metadata
    assert {'det', 'seg', 'cls', 'analysis', 'dev'} <= {*metadata.get_all('Provides-Extra')}
    required = metadata.get_all('Requires-Dist')
    assert [line for line in required if line.startswith('onedl-mmdetection==') and '"det"' in line]
    assert metadata['Version'] == __version__
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


@pytest.fixture
def environment(tmp_path):
    """An environment's packages, of which mmcv has no compiled operators."""
    mmcv_folder = Path(mmcv.__file__).parent
    packages = mmcv_folder.parent
    site = tmp_path / 'site'
    (site / 'mmcv').mkdir(parents=True)
    for path in packages.iterdir():
        if path.name == 'mmcv' or path.suffix == '.pth':
            continue
        (site / path.name).symlink_to(path)
    for path in mmcv_folder.iterdir():
        if not path.name.startswith(('_ext', '__pycache__')):
            (site / 'mmcv' / path.name).symlink_to(path)
    (record,) = packages.glob('*mmcv-*.dist-info/RECORD')
    (site / record.parent.name).unlink()
    shutil.copytree(record.parent, site / record.parent.name)
    text = record.read_text().replace('mmcv/_ext.py,,\n', '')
    (site / record.parent.name / 'RECORD').write_text(text)

    def run(code, check=True):
        path = os.pathsep.join([str(site), str(ROOT)])
        return subprocess.run(
            [sys.executable, '-S', '-W', 'ignore', '-c', code],
            env={**os.environ, 'PYTHONPATH': path},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=check,
        )

    run.site = site
    return run


def test_without_the_stand_in_mmcv_has_no_operators(environment):
    result = environment('import mmcv.ops', check=False)
    assert "No module named 'mmcv._ext'" in result.stderr


def test_importing_mmlinglo_is_enough(environment):
    code = 'import mmlinglo, sys; print("torchvision" in sys.modules); import mmdet.models, mmcv.ops as o;'
    code += 'print(o.nms.__module__, o.get_compiler_version(), sys.modules["mmcv._ext"].__name__)'
    expected = 'mmcv.ops.nms not compiled, operators by torchvision mmlinglo.mmcv_ops\n'
    assert environment(code).stdout.endswith(expected)


def test_linked_into_an_environment(environment):
    """Programs that do not import mmlinglo find it; pip knows the file; linking twice changes nothing."""
    code = 'from mmlinglo import mmcv_ops; print(mmcv_ops.link(), mmcv_ops.link())'
    assert environment(code).stdout == 'True True\n'
    code = 'import mmdet.models, mmcv.ops, mmcv._ext, sys; print("mmlinglo" in sys.modules, mmcv._ext.__file__)'
    link = environment.site / 'mmcv/_ext.py'
    assert environment(code).stdout == f'False {link}\n'
    assert link.resolve() == ROOT / 'mmlinglo/mmcv_ops.py'
    (record,) = environment.site.glob('*mmcv-*.dist-info/RECORD')
    assert record.read_text().count('mmcv/_ext.py,,\n') == 1


def test_compiled_operators_win_over_a_link(environment):
    compiled = importlib.machinery.EXTENSION_SUFFIXES[0]
    file = environment.site / f'mmcv/_ext{compiled}'
    code = 'import importlib; from mmlinglo import mmcv_ops as m; print(m.link());'
    code += f'open({str(file)!r}, "w").write("not really"); importlib.invalidate_caches();'
    code += 'print(m.is_compiled(m.find_ext()), m.link())'
    assert environment(code).stdout == 'True\nTrue False\n'

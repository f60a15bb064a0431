# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import subprocess
import sys

import pytest

WITH_CUSTOM_IMPORTS = """
from mmengine import Config
cfg = Config.fromstring('''
custom_imports = dict(imports=['mmlinglo'], allow_failed_imports=False)
model = dict(type='LinGlo', arch='b0')
''', '.py')
"""
WITHOUT = """
from mmengine import Config
cfg = Config.fromstring("model = dict(type='mmlinglo.LinGlo', arch='b0')", '.py')
"""
BUILD = """
import sys
from mmengine.registry import DefaultScope
from {toolbox}.registry import MODELS
assert {imported} == ('mmlinglo' in sys.modules)
DefaultScope.get_instance('test', scope_name='{toolbox}')
model = MODELS.build(cfg.model)
assert type(model).__name__ == 'LinGlo', type(model)
print(type(model).__module__)
"""


def run_python(code):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize('toolbox', ['mmpretrain', 'mmdet', 'mmseg'])
@pytest.mark.parametrize('config', [WITH_CUSTOM_IMPORTS, WITHOUT], ids=['custom_imports', 'prefix'])
def test_each_toolbox_finds_linglo(toolbox, config):
    imported = config is WITH_CUSTOM_IMPORTS
    result = run_python(config + BUILD.format(toolbox=toolbox, imported=imported))
    assert result.stdout.splitlines()[-1:] == ['mmlinglo.models.linglo'], result.stderr


def test_import_needs_no_toolbox_and_no_compiled_operators():
    code = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('mmdet', 'mmseg', 'mmpretrain') or name == 'mmcv._ext':
            raise ImportError(f'{name} is blocked')
sys.meta_path.insert(0, Blocker())
import torch, mmlinglo
print(len(mmlinglo.LinGlo('b0').eval()(torch.rand(1, 3, 32, 32))))
assert not any(name.startswith(('mmcv.ops', 'torchvision')) for name in sys.modules)
"""
    result = run_python(code)
    assert result.stdout.strip() == '4', result.stderr


def test_import_twice_and_through_both_names():
    code = """
import mmlinglo
from mmengine.utils import import_modules_from_strings
import_modules_from_strings(['mmlinglo', 'mmlinglo.models'])
from mmengine.registry import MODELS
assert MODELS.get('LinGlo') is MODELS.get('mmlinglo.LinGlo') is mmlinglo.LinGlo
print('same')
"""
    result = run_python(code)
    assert result.stdout.strip() == 'same', result.stderr

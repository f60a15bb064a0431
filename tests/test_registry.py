# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import subprocess
import sys

CONFIGS = """{
    'custom_imports': "custom_imports = dict(imports=['mmlinglo'], allow_failed_imports=False)\\n"
    "model = dict(type='LinGlo', arch='b0')",
    'prefix': "model = dict(type='mmlinglo.LinGlo', arch='b0')",
}"""
# A process for each toolbox, and in it one for each config, forked when what they share is imported.
BUILD = f"""
import importlib, os, sys
import mmcv.ops, torch
from mmengine import Config
from mmengine.registry import DefaultScope


def fork():
    child = os.fork()
    if child and os.waitpid(child, 0)[1]:
        sys.exit(f'{{toolbox}} failed')
    return not child


for toolbox in ('mmpretrain', 'mmdet', 'mmseg'):
    if fork():
        registry = importlib.import_module(f'{{toolbox}}.registry')
        registry.MODELS.import_from_location()  # the toolbox's own models
        for name, text in {CONFIGS}.items():
            if fork():
                assert 'mmlinglo' not in sys.modules
                cfg = Config.fromstring(text, '.py')
                assert ('mmlinglo' in sys.modules) == (name == 'custom_imports')
                DefaultScope.get_instance('test', scope_name=toolbox)
                model = registry.MODELS.build(cfg.model)
                print(toolbox, name, type(model).__module__, type(model).__name__, flush=True)
                sys.exit()
        sys.exit()
"""


def run_python(code):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)


def test_each_toolbox_finds_linglo():
    result = run_python(BUILD)
    found = [line for line in result.stdout.splitlines() if line.endswith('LinGlo')]
    assert found == [
        f'{toolbox} {name} mmlinglo.models.linglo LinGlo'
        for toolbox in ('mmpretrain', 'mmdet', 'mmseg')
        for name in ('custom_imports', 'prefix')
    ], result.stderr
    assert result.returncode == 0, result.stderr


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

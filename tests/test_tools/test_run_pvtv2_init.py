# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""PVTv2 trained, converted by the command line, evaluated and trained further: on very few images."""

import json
import os
import re

import pytest
import torch
from conftest import ROOT, import_tool, run_tool

from mmlinglo.utils.cli import UsageError

pytestmark = pytest.mark.slow
EXPERIMENT = 'tools/analysis_tools/run_pvtv2_init.py'
CONVERT = 'tools/model_converters/pvtv2_to_linglo.py'


def arguments(cifar10, folder):
    return [
        *('--seeds', 0, '--epochs', 2, '--steps', 2),
        *('--data-root', cifar10, '--data-format', 'folder'),
        *('--work-dir', folder / 'work', '--out', folder / 'results'),
        *('--cfg-options', 'train_dataloader.batch_size=10', 'train_dataloader.num_workers=1'),
        *('val_dataloader.num_workers=1', 'train_dataloader.dataset.pipeline.3.scale=64'),
        'val_dataloader.dataset.pipeline.1.scale=64',
    ]


def test_experiment_and_what_is_finished(cifar10, tmp_path):
    command = [EXPERIMENT, *arguments(cifar10, tmp_path)]
    run_tool(*command)
    report = json.loads((tmp_path / 'results.json').read_text())
    rows = {row['row']: row for row in report['rows']}
    assert report['provenance']['images'] == dict(train=20, test=10)
    assert [row['epochs'] for row in rows.values()] == [2, 0, 2, 2]
    for row in rows.values():
        assert row['seeds'] == 1
        assert row['seed0'] in range(0, 101, 10)  # of ten images
    text = (tmp_path / 'results.md').read_text()
    gain = rows['linglo-b0_pvtv2-init']['seed0'] - rows['linglo-b0']['seed0']
    assert f'mean {gain:+.2f}, by seed {gain:+.2f}. One seed decides nothing.' in text

    # what was converted fits the config that fine-tunes, and its backbone is what this starts from
    converted = torch.load(tmp_path / 'work/linglo-b0_converted/seed0.pth', weights_only=True)
    log = tmp_path / 'work/linglo-b0_pvtv2-init/seed0/train.log'
    assert re.search(r'loaded (\d+) of \1 backbone tensors from \S+seed0\.pth', log.read_text())
    assert any(key.startswith('head.') for key in converted['state_dict'])

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'work').rglob('*.pth')}
    run_tool(*command)  # trains nothing again
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_conversion_of_another_model_writes_nothing(tmp_path):
    torch.save(dict(model={'patch_embed1.proj.weight': torch.zeros(1)}), tmp_path / 'pvt.pth')
    config = ROOT / 'configs/imagenet/linglo-b0_pvtv2-init_8xb128-30e_in1k.py'
    out = tmp_path / 'out.pth'
    result = run_tool(CONVERT, config, tmp_path / 'pvt.pth', out, check=False)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith('error: ')
    assert 'pvt.pth' in result.stderr.strip().splitlines()[-1]
    assert os.listdir(tmp_path) == ['pvt.pth']


@pytest.mark.parametrize(
    ('folder', 'reason'), [('nowhere', 'No such file'), ('cifar10', 'specified classes')]
)
def test_conversion_without_the_training_images(folder, reason, cifar10, tmp_path):
    """In no folder, or in one with other classes than the config's."""
    timm = pytest.importorskip('timm')
    torch.save(timm.create_model('pvt_v2_b0').state_dict(), tmp_path / 'pvt.pth')
    config = ROOT / 'configs/imagenet/linglo-b0_pvtv2-init_8xb128-30e_in1k.py'
    root = dict(nowhere=tmp_path / 'nowhere', cifar10=cifar10)[folder]
    options = ['--cfg-options', f'train_dataloader.dataset.data_root={root}']
    arguments = [config, tmp_path / 'pvt.pth', tmp_path / 'out.pth', *options]
    with pytest.raises(UsageError, match=f'cannot be read .*{reason}.* name their folder with'):
        import_tool(CONVERT).main([str(argument) for argument in arguments])
    assert os.listdir(tmp_path) == ['pvt.pth']

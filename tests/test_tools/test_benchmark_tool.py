# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import csv
import json
import runpy
import sys

import pytest
import torch
from conftest import ROOT, TINY_ARCH, run_tool

from mmlinglo import LinGlo
from mmlinglo.analysis import bars, benchmark

TOOL = 'tools/analysis_tools/benchmark_backbones.py'


@pytest.fixture
def run_here(monkeypatch, tmp_path):
    """Run the tool in this process, its measurements too, and read what it wrote."""
    threads = torch.get_num_threads()

    def run(*args):
        command = [TOOL, '--threads', '1', '--rounds', '2', '--out', tmp_path / 'new/out', *args]
        monkeypatch.setattr(sys, 'argv', [str(arg) for arg in command])
        runpy.run_path(str(ROOT / TOOL), run_name='__main__')
        return read(tmp_path / 'new/out')

    monkeypatch.setattr(
        benchmark, 'result_or_out_of_memory', lambda function, *args, **_: function(*args)
    )
    yield run
    torch.set_num_threads(threads)


def read(out):
    """Provenance and rows of the JSON file, whose lines the CSV file has too."""
    report = json.loads(out.with_name('out.json').read_text())
    with open(out.with_name('out.csv'), newline='') as file:
        assert len(list(csv.DictReader(file))) == len(report['rows'])
    return report['provenance'], report['rows']


def is_png(path):
    return path.read_bytes().startswith(b'\x89PNG')


def test_comparison(run_here, tmp_path, capsys):
    args = '--device cpu --models linglo_b0 resnet18 --shape 60 64 --no-memory --reference resnet18'
    source, rows = run_here(*args.split())
    assert (source['threads'], source['dtype'], source['rounds']) == (1, 'float32', 2)
    assert 'timm' in source['versions']
    found = {(row['model'], row['form']): row for row in rows}
    assert set(found) == {
        (model, form) for model in ('linglo_b0', 'resnet18') for form in ('trained', 'fused')
    }
    reference = found['resnet18', 'fused']['latency_ms']
    for row in rows:
        assert (row['height'], row['width'], row['status']) == (64, 64, 'ok')
        assert 0 < row['latency_lower_ms'] <= row['latency_ms'] <= row['latency_upper_ms']
        assert row['images_per_s'] == pytest.approx(1000 / row['latency_ms'])
        assert row['latency_ratio'] == pytest.approx(row['latency_ms'] / reference)
        assert row['peak_memory_mib'] is None
    # ResNet18 of 224 x 224 has 1.814 G multiply-adds, 1.8135 G without the classifier (0.5 M).
    trained = found['resnet18', 'trained']
    assert trained['macs_g'] == pytest.approx(1.8136 * (64 / 224) ** 2, rel=1e-3)
    assert trained['params_m'] == pytest.approx(11.689512 - 0.513)
    assert 'torchvision' in trained['top1_source']
    assert 'not reproduced' in found['linglo_b0', 'fused']['top1_source']
    assert found['linglo_b0', 'fused']['params_m'] < found['linglo_b0', 'trained']['params_m']
    assert is_png(tmp_path / 'new/out.png')
    printed = capsys.readouterr().out
    assert 'inference, batch of 1 of 64 x 64, four feature maps, float32; ' in printed
    assert printed.count('| linglo_b0 ') == printed.count('| resnet18  ') == 2


def test_training(run_here):
    args = '--device cpu --mode train --models resnet18 --shape 64 64 --batch-size 2 --no-memory'
    source, (row,) = run_here(*args.split(), '--dtype', 'autocast', '--channels-last')
    assert (source['mode'], source['autocast'], source['channels_last']) == ('train', True, True)
    assert (row['form'], row['status'], row['latency_ratio']) == ('trained', 'ok', 1)
    assert row['images_per_s'] == pytest.approx(2000 / row['latency_ms'])


def test_sweep(run_here, tmp_path, monkeypatch, capsys):
    # 64 pixels take 1 s, 96 take 2.25 s.
    monkeypatch.setattr(
        benchmark,
        '_profile',
        lambda _, setting, __: benchmark.Profile(10.0, (setting.shape[0] / 64) ** 2),
    )
    args = '--device cpu --sweep --models linglo_b0 --sizes 96 64 128 --max-seconds 2'
    source, rows = run_here(*args.split())
    assert source['max_seconds'] == 2
    assert [(row['width'], row['status']) for row in rows] == [(64, 'ok'), (96, 'too slow')]
    assert [row['latency_ms'] is None for row in rows] == [False, True]
    assert is_png(tmp_path / 'new/out.png')
    assert 'linglo_b0, 96 pixels: too slow' in capsys.readouterr().err


def test_bars(run_here, monkeypatch, capsys):
    """All bars, of small things."""
    monkeypatch.setattr(bars, 'ATTENTION_BARS', (((1, 100, 8, 2), 1e6, 1e-6),))
    monkeypatch.setattr(bars, 'attention_shapes', lambda: [(1, 64, 8, 2)])
    monkeypatch.setattr(bars, 'GROWTH_SHAPES', ((1, 64, 8, 2), (1, 256, 8, 2)))
    monkeypatch.setattr(bars, '_attention_peak', lambda _, shape, __: shape[1] / 10)
    # Here, where all is small.
    monkeypatch.setattr(bars, 'call_in_fresh_process', lambda function, *args: function(*args))
    monkeypatch.setattr(bars, 'CLASSIFICATION', (64, 64))
    monkeypatch.setattr(bars, 'DETECTION', (64, 96))
    monkeypatch.setattr(bars, 'PEER_BARS', (('linglo_b0', 'pvt_v2_b0', 0.0, 1e6),))
    monkeypatch.setattr(bars, 'MATRIX_SIZE', 64)
    monkeypatch.setattr(bars, 'LinGlo', lambda _arch, **kwargs: LinGlo(TINY_ARCH, **kwargs))
    source, rows = run_here('--bars')
    assert (source['threads'], source['dtype']) == (1, 'float32')
    assert {row['unit'] for row in rows} == {'ms', 'MiB', 'GFLOP/s'}
    forward, both, *_ = rows
    assert (forward['verdict'], both['verdict']) == ('missed', 'met')
    for row in rows:
        inverse = (row['bar'] or '').startswith('theirs')
        pair = row['ours'], row['theirs']
        assert row['ratio'] == pytest.approx(pair[1] / pair[0] if inverse else pair[0] / pair[1])
    peers = [row for row in rows if 'deployed against' in row['what']]
    assert [(row['shape'], row['verdict']) for row in peers if 'PVT' in row['what']] == [
        ('B 8, 64 x 64', 'missed'),
        ('B 1, 64 x 96', 'met'),
    ]
    growth = next(row for row in rows if 'N = 256 (ours) and 64' in row['what'])
    assert (growth['ours'], growth['theirs'], growth['ratio']) == (25.6, 6.4, 4)
    kept = next(row for row in rows if 'four branches, kept' in row['what'])
    assert 0 < kept['ratio'] < 1
    moments = next(row for row in rows if 'moments of the patches' in row['what'])
    assert 0 < moments['ours']
    assert 0 < rows[-1]['ratio']
    assert rows[-1]['verdict'] is None
    assert '| missed ' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--models', 'vgg'], 'no model vgg; there are linglo_b0, '),
        (['--reference', 'vgg'], "the reference 'vgg' must be among the models"),
        (['--rounds', '1'], 'rounds must be at least 2, got 1'),
        (['--rounds', '0', '--bars'], 'rounds must be at least 2, got 0'),
        (['--batch-size', '0'], 'batch size must be at least 1, got 0'),
        (['--shape', '0', '64'], 'at least 32 pixels high and wide, got (0, 64)'),
        (['--sweep', '--sizes', '16'], 'at least 32 pixels high and wide, got (16, 16)'),
    ],
)
def test_refuses(run_here, tmp_path, args, message):
    with pytest.raises(SystemExit) as caught:
        run_here('--device', 'cpu', *args)
    assert str(caught.value).startswith('error: ')
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_in_processes_of_their_own(tmp_path):
    args = '--device cpu --models linglo_b0 resnet18 --shape 64 64 --rounds 2 --threads 1'
    run_tool(TOOL, *args.split(), '--out', tmp_path / 'out')
    _, rows = read(tmp_path / 'out')
    assert len(rows) == 4
    for row in rows:
        weights = row['params_m'] * 1e6 * 4 / 2**20
        assert weights - 1 < row['peak_memory_mib'] < 2 * weights + 10
        assert row['first_call_s'] > 0
    assert is_png(tmp_path / 'out.png')

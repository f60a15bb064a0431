# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import csv
import json

import pytest
import torch
from conftest import TINY_ARCH, import_tool, run_tool

from mmlinglo import LinGlo
from mmlinglo.analysis import bars, benchmark, peers
from mmlinglo.analysis.bars import Layer
from mmlinglo.utils.cli import UsageError

TOOL = 'tools/analysis_tools/benchmark_backbones.py'
ATTENTION = 'tools/analysis_tools/benchmark_attention.py'


@pytest.fixture
def run_here(monkeypatch, tmp_path):
    """Run a tool in this process, its measurements too, and read what it wrote."""
    threads = torch.get_num_threads()

    def run(*args, tool=TOOL):
        command = ['--threads', '1', '--rounds', '2', '--out', tmp_path / 'new/out', *args]
        assert import_tool(tool).main([str(arg) for arg in command]) == 0
        return read(tmp_path / 'new/out')

    for module in (bars, benchmark):
        monkeypatch.setattr(
            module, 'call_in_fresh_process', lambda function, *args: function(*args)
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
    args = '--device cpu --models resnet18 linglo_b0 --shape 60 64 --no-memory'
    source, rows = run_here(*args.split())
    assert (source['threads'], source['dtype'], source['rounds']) == (1, 'float32', 2)
    assert source['reference'] == 'resnet18'
    assert 'timm' in source['versions']
    found = {(row['model'], row['form']): row for row in rows}
    assert set(found) == {
        (model, form) for model in ('linglo_b0', 'resnet18') for form in ('trained', 'fused')
    }
    reference = found['resnet18', 'fused']['latency_ms']
    for row in rows:
        assert (row['height'], row['width'], row['status']) == (64, 64, 'ok')
        assert 0 < row['latency_lower_ms'] <= row['latency_ms'] <= row['latency_upper_ms']
        assert row['latency_ratio'] == pytest.approx(row['latency_ms'] / reference)
        assert row['peak_memory_mib'] is None
    assert 'torchvision' in found['resnet18', 'trained']['top1_source']
    assert 'not reproduced' in found['linglo_b0', 'fused']['top1_source']
    assert found['linglo_b0', 'fused']['params_m'] < found['linglo_b0', 'trained']['params_m']
    assert is_png(tmp_path / 'new/out.png')
    printed = capsys.readouterr().out
    assert 'Inference, Batch of 1 of 64 x 64 Pixels, Four Feature Maps, float32; ' in printed
    assert printed.count('| linglo_b0 ') == printed.count('| resnet18  ') == 2


def test_training(run_here):
    args = '--device cpu --mode train --models resnet18 --shape 64 64 --batch-size 2 --no-memory'
    source, (row,) = run_here(*args.split(), '--dtype', 'autocast')
    assert (source['mode'], source['autocast'], source['dtype']) == ('train', True, 'float32')
    assert (row['form'], row['status'], row['latency_ratio']) == ('trained', 'ok', 1)
    assert row['images_per_s'] == pytest.approx(2000 / row['latency_ms'])


def test_sweep(run_here, tmp_path, monkeypatch, capsys):
    # 64 pixels take 1 s, 96 take 2.25 s.
    monkeypatch.setattr(
        benchmark, 'profile', lambda _, setting: (10.0, (setting.shape[0] / 64) ** 2)
    )
    args = '--device cpu --models linglo_b0 --sizes 96 64 128 --max-seconds 2'
    source, rows = run_here(*args.split())
    assert source['max_seconds'] == 2
    assert [(row['width'], row['status']) for row in rows] == [(64, 'ok'), (96, 'too slow')]
    assert [row['latency_ms'] is None for row in rows] == [False, True]
    assert is_png(tmp_path / 'new/out.png')
    assert 'linglo_b0, 96 pixels: too slow' in capsys.readouterr().err


@pytest.mark.parametrize(('options', 'form'), [([], 'fused'), (['--mode', 'train'], 'trained')])
def test_attention_is_a_sweep(run_here, monkeypatch, options, form):
    monkeypatch.setattr(benchmark, 'profile', lambda *_: (10.0, 1.0))
    args = '--device cpu --models linglo_b1 linglo_b1_dot_product --sizes 64 --batch-size 2'
    source, rows = run_here(*args.split(), *options, tool=ATTENTION)
    assert [row['model'] for row in rows] == ['linglo_b1', 'linglo_b1_dot_product']
    assert {row['form'] for row in rows} == {form}
    assert (source['reference'], source['batch_size']) == ('linglo_b1', 2)
    assert rows[0]['latency_ratio'] == 1


def test_bars(run_here, monkeypatch, capsys):
    """All bars, of small things."""
    layers = [Layer(1, positions, 8, 2) for positions in (100, 64, 256)]
    monkeypatch.setattr(bars, 'ATTENTION_BARS', ((layers[0], 1e-6, 1e6),))
    monkeypatch.setattr(bars, 'list_layers', lambda: layers[1:2])
    monkeypatch.setattr(bars, 'GROWTH_LAYERS', tuple(layers[1:]))
    monkeypatch.setattr(bars, 'profile', lambda _, layer: (layer.positions / 10, 1.0))
    monkeypatch.setattr(peers, 'LinGlo', lambda _, **kwargs: LinGlo(TINY_ARCH, **kwargs))
    for work in bars.WORKS.values():
        monkeypatch.setitem(work, 'shape', (64, 64))
        monkeypatch.setitem(work, 'batch_size', 2)
    pair = ('linglo_b0', 'pvt_v2_b0')
    limits = {'pooled features': 0.0, 'four maps': 1e6, bars.STEP: 1.4}
    all_peers = [(*pair, work, at_most) for work, at_most in limits.items()]
    monkeypatch.setattr(bars, 'PEER_BARS', all_peers)
    source, rows = run_here('--bars')
    assert (source['threads'], source['dtype']) == (1, 'float32')
    assert {row['unit'] for row in rows} == {'ms', 'MiB'}
    forward, both, *_ = rows
    assert (forward['verdict'], both['verdict']) == ('missed', 'met')
    for row in rows:
        assert row['ratio'] == pytest.approx(row['ours'] / row['theirs'])
    deployed = [row for row in rows if 'deployed against' in row['what']]
    assert [row['verdict'] for row in deployed] == ['missed', 'met']
    assert {row['shape'] for row in deployed} == {'B 2, 64 x 64'}
    growth = next(row for row in rows if 'N = 256 (ours) and 64' in row['what'])
    assert (growth['ours'], growth['theirs'], growth['ratio']) == (25.6, 6.4, 4)
    kept = next(row for row in rows if 'four branches, kept' in row['what'])
    assert 0 < kept['ratio'] < 1
    limits = {row['what']: row['bar'] for row in rows if row['bar']}
    step = limits['LinGlo-b0 against PVTv2-B0, forward + backward']
    assert step == 'ours / theirs <= 1.4'
    encoding = 'LinGlo-b0, RP-CPE as one convolution against four branches'
    assert limits[f'{encoding}, forward + backward'] == 'ours / theirs <= 0.5'
    assert limits[f'{encoding}, kept for the backward'] == 'ours / theirs <= 0.5'
    (least,) = (row for row in rows if 'one plain convolution' in row['what'])
    assert 0 < least['ratio']
    assert least['verdict'] is None
    assert '| missed ' in capsys.readouterr().out


def test_all_bars_are_there():
    """What the project promises, beside the bars of the attention layer."""
    promised = {(bar.what, str(bar.ours)): bar for bar in bars.list_bars()}
    pooled, maps = 'B 8, 224 x 224', 'B 1, 800 x 1344'
    for number, pooled_at_most in ((0, 0.85), (1, 0.95), (2, 0.95)):
        what = f'LinGlo-b{number} deployed against PVTv2-B{number}'
        for outputs, shape, at_most in (
            ('pooled features', pooled, pooled_at_most),
            ('four maps', maps, 0.42),
        ):
            bar = promised[f'{what}, {outputs}', shape]
            assert (bar.at_most, bar.ours.fused, bar.theirs.fused) == (at_most, True, False)
            assert bar.ours.maps == (outputs == 'four maps')
    convnext = 'LinGlo-b2 deployed against ConvNeXt-T, pooled features'
    assert promised[convnext, pooled].at_most == 1.25
    training = promised['LinGlo-b0 against PVTv2-B0, forward + backward', 'B 16, 224 x 224']
    assert (training.at_most, training.ours.train_step) == (1.4, True)
    assert sum(isinstance(bar.ours, benchmark.Setting) for bar in promised.values()) == 11
    assert (bars.ENCODING, bars.GROWTH) == (0.5, 4.4)


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--shape', '0', '64'], r'at least 32 pixels high and wide, got \(0, 64\)'),
        (['--sizes', '16'], r'at least 32 pixels high and wide, got \(16, 16\)'),
        (['--mode', 'train', '--forms', 'fused'], 'the fused form is not for training'),
        (['--models', 'coatnet_0_224', '--shape', '64', '64'], 'no four feature maps'),
        (['--max-seconds', '3', '--no-memory'], '--max-seconds cannot be used with --no-memory'),
    ],
)
def test_refuses(run_here, tmp_path, args, message):
    with pytest.raises(UsageError, match=message):
        run_here(*args)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--models', 'vgg'], "invalid choice: 'vgg' (choose from"),
        (['--rounds', '1'], '--rounds: must be at least 2, got 1'),
        (['--rounds', '0', '--bars'], '--rounds: must be at least 2, got 0'),
        (['--threads', '0'], '--threads: must be at least 1, got 0'),
        (['--batch-size', '0'], '--batch-size: must be at least 1, got 0'),
        (['--max-seconds', 'nan'], '--max-seconds: must be at least 0.001, got nan'),
        (['--sweep', '--shape', '64', '64'], 'argument --shape: not allowed with argument --sweep'),
        (['--sizes', '64', '--sweep'], 'argument --sweep: not allowed with argument --sizes'),
        (['--bars', '--models', 'linglo_b0'], 'unrecognized arguments: --models linglo_b0'),
    ],
)
def test_refuses_at_once(args, message, capsys):
    with pytest.raises(SystemExit):
        import_tool(TOOL).main(args)
    assert message in capsys.readouterr().err


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


@pytest.mark.slow
def test_benchmark_attention(tmp_path):
    # At 224 pixels stage 1 has N = 56 * 56 = 3136 positions; the matrix of all pairs takes
    # 3136**2 * 4 bytes = 37.5 MiB, the softmax as much.
    # key-only's largest: a few maps of 3136 * 256 * 4 bytes = 3.1 MiB, and 13 MiB of weights.
    args = '--sizes 224 --models linglo_b0 linglo_b0_dot_product_materialised --rounds 2'
    run_tool(ATTENTION, *args.split(), '--threads', 1, '--device', 'cpu', '--out', tmp_path / 'out')
    source, (key_only, dot_product) = read(tmp_path / 'out')
    assert (source['batch_size'], source['threads']) == (1, 1)
    assert (key_only['model'], key_only['status']) == ('linglo_b0', 'ok')
    assert 13 < key_only['peak_memory_mib'] < 40
    assert 0 < key_only['latency_lower_ms'] <= key_only['latency_ms']
    assert 13 + 2 * 37.5 < dot_product['peak_memory_mib']
    assert is_png(tmp_path / 'out.png')

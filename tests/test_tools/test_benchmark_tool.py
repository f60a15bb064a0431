# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import csv
import json

import pytest
import torch
from conftest import TINY_ARCH, import_tool, run_tool

from mmlinglo import LinGlo
from mmlinglo.analysis import bars, benchmark
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
            module, 'call_in_fresh_process', lambda function, *args, **_: function(*args)
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
        assert row['latency_ratio'] == pytest.approx(row['latency_ms'] / reference)
        assert row['peak_memory_mib'] is None
    assert 'torchvision' in found['resnet18', 'trained']['top1_source']
    assert 'not reproduced' in found['linglo_b0', 'fused']['top1_source']
    assert found['linglo_b0', 'fused']['params_m'] < found['linglo_b0', 'trained']['params_m']
    assert is_png(tmp_path / 'new/out.png')
    printed = capsys.readouterr().out
    assert 'Inference, batch of 1 of 64 x 64 pixels, four feature maps, float32; ' in printed
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
        benchmark, '_profile', lambda _, setting, __: (10.0, (setting.shape[0] / 64) ** 2)
    )
    args = '--device cpu --sweep --models linglo_b0 --sizes 96 64 128 --max-seconds 2'
    source, rows = run_here(*args.split())
    assert source['max_seconds'] == 2
    assert [(row['width'], row['status']) for row in rows] == [(64, 'ok'), (96, 'too slow')]
    assert [row['latency_ms'] is None for row in rows] == [False, True]
    assert is_png(tmp_path / 'new/out.png')
    assert 'linglo_b0, 96 pixels: too slow' in capsys.readouterr().err


@pytest.mark.parametrize(('options', 'form'), [([], 'fused'), (['--train-step'], 'trained')])
def test_attention_is_a_sweep(run_here, monkeypatch, options, form):
    monkeypatch.setattr(benchmark, '_profile', lambda *_: (10.0, 1.0))
    args = '--device cpu --arch b1 --sizes 64 --attentions key_only dot_product --batch-size 2'
    source, rows = run_here(*args.split(), *options, tool=ATTENTION)
    assert [row['model'] for row in rows] == ['linglo_b1', 'linglo_b1_dot_product']
    assert {row['form'] for row in rows} == {form}
    assert (source['reference'], source['batch_size']) == ('linglo_b1', 2)
    assert rows[0]['latency_ratio'] == 1


def test_bars(run_here, monkeypatch, capsys):
    """All bars, of small things."""
    shapes = [(1, 100, 8, 2), (1, 64, 8, 2), (1, 256, 8, 2)]
    monkeypatch.setattr(bars, 'ATTENTION_BARS', ((shapes[0], 1e6, 1e-6),))
    monkeypatch.setattr(bars, 'attention_shapes', lambda: shapes[1:2])
    monkeypatch.setattr(bars, 'GROWTH_SHAPES', tuple(shapes[1:]))
    monkeypatch.setattr(bars, 'attention_peak', lambda shape, *_: shape[1] / 10)
    monkeypatch.setattr(bars, 'MATRIX_SIZE', 64)
    monkeypatch.setattr(bars, 'LinGlo', lambda _arch, **kwargs: LinGlo(TINY_ARCH, **kwargs))
    real = bars.network
    monkeypatch.setattr(
        bars, 'network', lambda name, *_, **kwargs: real(name, (64, 64), 2, **kwargs)
    )
    pair = ('linglo_b0', 'pvt_v2_b0')
    both = ((*pair, (224, 224), 8, 0.0), (*pair, (800, 1344), 1, 1e6))
    monkeypatch.setattr(bars, 'PEER_BARS', both)
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
    assert [(row['shape'], row['verdict']) for row in peers] == [
        ('B 8, 224 x 224', 'missed'),
        ('B 1, 800 x 1344', 'met'),
    ]
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
    assert 0 < rows[-1]['ratio']
    assert rows[-1]['verdict'] is None
    assert '| missed ' in capsys.readouterr().out


def test_all_bars_are_there():
    """What the project promises, beside the bars of the attention layer."""
    promised = {(ours, theirs, shape): bar for ours, theirs, shape, _, bar in bars.PEER_BARS}
    for size, peer_size in (('b0', 0.85), ('b1', 0.95), ('b2', 0.95)):
        names = (f'linglo_{size}', f'pvt_v2_{size}')
        assert promised.pop((*names, (224, 224))) == peer_size
        assert promised.pop((*names, (800, 1344))) == 0.42
    assert promised == {('linglo_b2', 'convnext_tiny', (224, 224)): 1.25}
    assert (bars.TRAINING_STEP, bars.ENCODING, bars.GROWTH) == (1.4, 0.5, 4.4)


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--models', 'vgg'], 'no model vgg; there are linglo_b0, '),
        (['--reference', 'vgg'], "the reference 'vgg' must be among the models"),
        (['--rounds', '1'], 'rounds must be at least 2, got 1'),
        (['--rounds', '0', '--bars'], 'rounds must be at least 2, got 0'),
        (['--batch-size', '0'], 'batch size must be at least 1, got 0'),
        (['--shape', '0', '64'], r'at least 32 pixels high and wide, got \(0, 64\)'),
        (['--sweep', '--sizes', '16'], r'at least 32 pixels high and wide, got \(16, 16\)'),
        (['--sweep', '--memory-limit', '0'], 'memory limit must be above 0, got 0'),
    ],
)
def test_refuses(run_here, tmp_path, args, message):
    with pytest.raises(UsageError, match=message):
        run_here(*args)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--sweep', '--shape', '64', '64'], '--shape goes without --sweep'),
        (['--sweep', '--no-memory'], '--no-memory goes without --sweep'),
        (['--max-seconds', '3'], '--max-seconds needs --sweep'),
        (['--bars', '--models', 'linglo_b0'], 'unrecognized arguments: --models linglo_b0'),
    ],
)
def test_no_option_is_ignored(args, message, capsys):
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
    # 3136**2 * 4 bytes = 37.5 MiB, the softmax as much: above the limit of 51 MiB.
    # key-only's largest: a few maps of 3136 * 256 * 4 bytes = 3.1 MiB, and 13 MiB of weights.
    args = '--sizes 224 --attentions key_only dot_product_materialised --rounds 2 --threads 1'
    out = tmp_path / 'out'
    done = run_tool(
        ATTENTION, *args.split(), '--device', 'cpu', '--memory-limit', '0.05', '--out', out
    )
    source, (key_only, dot_product) = read(out)
    assert (source['batch_size'], source['threads'], source['memory_limit']) == (1, 1, 0.05)
    assert (key_only['model'], key_only['status']) == ('linglo_b0', 'ok')
    assert 13 < key_only['peak_memory_mib'] < 40
    assert 0 < key_only['latency_lower_ms'] <= key_only['latency_ms']
    assert dot_product['status'] == 'out of memory'
    assert dot_product['latency_ms'] is dot_product['peak_memory_mib'] is None
    assert 'out of memory' in done.stdout
    assert is_png(tmp_path / 'out.png')

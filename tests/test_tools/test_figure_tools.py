# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import csv
import json
import runpy
import sys

import pytest
import torch
from conftest import ROOT, TINY_ARCH, run_tool
from mmlinglo.analysis.attention_scaling import Setting, build_step, measure_size
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmlinglo import LinGlo
from mmlinglo.analysis import attention_scaling

BENCHMARK = 'tools/analysis_tools/benchmark_attention.py'
CURVES = 'tools/analysis_tools/plot_curves.py'


def read(out):
    """Provenance and rows of the JSON file, rows of the CSV file; the PNG must be one."""
    assert out.with_name(out.name + '.png').read_bytes().startswith(b'\x89PNG')
    report = json.loads(out.with_name(out.name + '.json').read_text())
    with open(out.with_name(out.name + '.csv'), newline='') as file:
        return report['provenance'], report['rows'], list(csv.DictReader(file))


def run_here(monkeypatch, tool, *args):
    """Run a tool in this process, which saves the imports."""
    monkeypatch.setattr(sys, 'argv', [tool, *map(str, args)])
    runpy.run_path(str(ROOT / tool), run_name='__main__')


def log(work_dir, lines):
    folder = work_dir / '20260101_000000' / 'vis_data'
    folder.mkdir(parents=True)
    (folder / 'scalars.json').write_text(''.join(json.dumps(line) + '\n' for line in lines))


def test_benchmark_attention(tmp_path):
    # At 224 pixels stage 1 has N = 56 * 56 = 3136 positions; the matrix of all pairs takes
    # 3136**2 * 4 bytes = 37.5 MiB, the softmax as much: above the limit of 51 MiB.
    # key-only's largest: a few maps of 3136 * 256 * 4 bytes = 3.1 MiB, and 13 MiB of weights.
    args = '--sizes 224 --attentions key_only dot_product_materialised --rounds 2 --threads 1'
    out = tmp_path / 'fig4'
    done = run_tool(
        BENCHMARK, *args.split(), '--device', 'cpu', '--memory-limit', '0.05', '--out', out
    )
    source, rows, lines = read(out)
    assert (source['arch'], source['batch_size'], source['threads']) == ('b0', 1, 1)
    assert source['memory_limit_gib'] == 0.05
    key_only, dot_product = rows
    assert (key_only['attention'], key_only['status']) == ('key_only', 'ok')
    assert 13 < key_only['peak_memory_mib'] < 40
    assert 0 < key_only['latency_lower_ms'] <= key_only['latency_ms']
    assert key_only['latency_ms'] <= key_only['latency_upper_ms']
    assert dot_product['status'] == lines[1]['status'] == 'out of memory'
    assert dot_product['latency_ms'] is dot_product['peak_memory_mib'] is None
    assert lines[1]['latency_ms'] == lines[1]['peak_memory_mib'] == ''
    assert done.stdout.count('out of memory') == 1


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.parametrize('train_step', [False, True])
@pytest.mark.parametrize('attention', ['key_only', 'dot_product', 'dot_product_materialised'])
def test_only_materialised_attention_holds_the_matrix(attention, train_step):
    # Stage 1 of a 128-pixel image: N = 32 * 32 positions, one head, batch 2.
    setting = Setting(arch=TINY_ARCH, batch_size=2, train_step=train_step)
    step = build_step(attention, 128, setting)
    with LargestTensor() as largest:
        step()
    if attention == 'dot_product_materialised':
        assert largest.elements == 2 * 1024 * 1024
    else:
        assert largest.elements < 1024 * 1024


def test_training_form_is_trained_and_deployed_form_infers(monkeypatch):
    built = []

    def spy(*args, **kwargs):
        built.append(LinGlo(*args, **kwargs))
        return built[-1]

    monkeypatch.setattr(attention_scaling, 'LinGlo', spy)
    for train_step in (False, True):
        build_step('key_only', 64, Setting(arch=TINY_ARCH, train_step=train_step))()
    inference, training = built
    assert inference.deploy
    assert not inference.training
    assert all(p.grad is None for p in inference.parameters())
    assert not training.deploy
    assert training.training
    assert all(p.grad is not None for p in training.parameters())


def test_benchmark_attention_refuses(monkeypatch):
    with pytest.raises(ValueError, match='sizes must be at least 64 pixels, got 32'):
        measure_size(32, Setting())
    with pytest.raises(ValueError, match='rounds must be at least 2, got 1'):
        measure_size(64, Setting(), rounds=1)
    with pytest.raises(ValueError, match='above 0 GiB, got 0'):
        measure_size(64, Setting(), limit_gib=0)
    with pytest.raises(ValueError, match='batch size must be at least 1, got 0'):
        Setting(batch_size=0)
    with pytest.raises(ValueError, match=r"attention must be one of .*, got 'query_only'"):
        build_step('query_only', 64, Setting())
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit, match="error: device 'cuda': PyTorch finds no GPU here"):
        run_here(monkeypatch, BENCHMARK, '--device', 'cuda')


def test_plot_curves(tmp_path, monkeypatch, capsys):
    for name, values in dict(b0_seed0=[40, 60], b0_seed1=[50, 64], woc=[30, 41]).items():
        lines = [dict(iter=5, epoch=1, step=5, loss=float('nan'))]
        lines += [{'accuracy/top1': value, 'step': i} for i, value in enumerate(values, 1)]
        log(tmp_path / name, lines)
    out = tmp_path / 'figures' / 'fig5'
    args = [CURVES, tmp_path / 'b0_seed*', tmp_path / 'woc', '--out', out]
    run_here(monkeypatch, *args, '--labels', 'LinGlo-b0', 'w/o-C')
    source, rows, lines = read(out)
    assert source['key'] == 'accuracy/top1'
    found = [(row['label'], row['work_dir'], row['epoch'], row['accuracy/top1']) for row in rows]
    seeds = [str(tmp_path / f'b0_seed{i}') for i in (0, 1)]
    assert found == [
        ('LinGlo-b0', seeds[0], 1, 40),
        ('LinGlo-b0', seeds[0], 2, 60),
        ('LinGlo-b0', seeds[1], 1, 50),
        ('LinGlo-b0', seeds[1], 2, 64),
        ('w/o-C', str(tmp_path / 'woc'), 1, 30),
        ('w/o-C', str(tmp_path / 'woc'), 2, 41),
    ]
    assert [float(line['accuracy/top1']) for line in lines] == [40, 60, 50, 64, 30, 41]
    printed = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in printed.splitlines()]
    assert cells[2:4] == [
        ['LinGlo-b0', '2', '2', '62', '60', '64'],
        ['w/o-C', '1', '2', '41', '41', '41'],
    ]

    run_here(monkeypatch, *args, '--key', 'loss')  # NaN: an empty cell, no broken JSON
    _, rows, lines = read(out)
    assert [row['loss'] for row in rows] == [None] * 3
    assert [line['label'] for line in lines] == ['b0_seed*', 'b0_seed*', 'woc']


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['epochs', '--key', 'top1'], "no scalar 'top1' after step 0; it has: acc"),
        (['epochs', 'iterations', '--key', 'acc'], 'some steps of'),
        (['epochs', 'missing'], "no folder 'missing'"),
        (['epochs', 'iterations', '--labels', 'one'], '2 work dirs and 1 labels'),
        (['epochs', 'late', '--labels', 'a', 'a', '--key', 'acc'], "'a': the 2 runs"),
    ],
)
def test_plot_curves_refuses(tmp_path, monkeypatch, args, message):
    for name, extra, step in (
        ('epochs', dict(epoch=1), 1),
        ('iterations', {}, 1),
        ('late', dict(epoch=2), 2),
    ):
        log(tmp_path / name, [dict(extra, iter=5, step=5), dict(acc=1.0, step=step)])
    folders = {name: tmp_path / name for name in ('epochs', 'iterations', 'late')}
    out = tmp_path / 'out'
    with pytest.raises(SystemExit) as caught:
        run_here(monkeypatch, CURVES, *(folders.get(arg, arg) for arg in args), '--out', out)
    assert str(caught.value).startswith('error: ')
    assert message in str(caught.value)
    assert not list(tmp_path.glob('out*'))

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import csv
import json

import pytest
from conftest import import_tool, run_tool

from mmlinglo.utils.cli import UsageError

CURVES = 'tools/analysis_tools/plot_curves.py'


def read(out):
    """Provenance and rows of the JSON file, rows of the CSV file; the PNG must be one."""
    assert out.with_name(out.name + '.png').read_bytes().startswith(b'\x89PNG')
    report = json.loads(out.with_name(out.name + '.json').read_text())
    with open(out.with_name(out.name + '.csv'), newline='') as file:
        return report['provenance'], report['rows'], list(csv.DictReader(file))


def log(work_dir, lines):
    folder = work_dir / '20260101_000000' / 'vis_data'
    folder.mkdir(parents=True)
    (folder / 'scalars.json').write_text(''.join(json.dumps(line) + '\n' for line in lines))


def test_plot_curves(tmp_path):
    for name, values in dict(b0_seed0=[40, 60], b0_seed1=[50, 64], woc=[30, 41]).items():
        lines = [dict(iter=5, epoch=1, step=5, loss=float('nan'))]
        lines += [{'accuracy/top1': value, 'step': i} for i, value in enumerate(values, 1)]
        log(tmp_path / name, lines)
    out = tmp_path / 'figures' / 'fig5'
    args = [CURVES, tmp_path / 'b0_seed*', tmp_path / 'woc', '--out', out]
    printed = run_tool(*args, '--labels', 'LinGlo-b0', 'w/o-C').stdout
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
    cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in printed.splitlines()]
    assert cells[2:4] == [
        ['LinGlo-b0', '2', '2', '62', '60', '64'],
        ['w/o-C', '1', '2', '41', '41', '41'],
    ]

    main = import_tool(CURVES).main
    assert (
        main([str(arg) for arg in (*args[1:], '--key', 'loss')]) == 0
    )  # NaN: an empty cell, no broken JSON
    _, rows, lines = read(out)
    assert [row['loss'] for row in rows] == [None] * 3
    assert [line['label'] for line in lines] == ['b0_seed*', 'b0_seed*', 'woc']


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['epochs', '--key', 'acc', '--out', '/dev/null/x'], "'/dev/null/x' cannot be written"),
        (['epochs', '--key', 'top1'], "no scalar 'top1' after step 0; it has: acc"),
        (['epochs', 'iterations', '--key', 'acc'], 'some steps of'),
        (['epochs', 'missing', '--key', 'acc'], "no folder 'missing'"),
        (['epochs', 'iterations', '--labels', 'one'], '2 work dirs and 1 labels'),
        (
            ['epochs', 'late', '--labels', 'a', 'a', '--key', 'acc'],
            "'a': the runs of one curve have no step",
        ),
    ],
)
def test_plot_curves_refuses(tmp_path, args, message):
    for name, extra, step in (
        ('epochs', dict(epoch=1), 1),
        ('iterations', {}, 1),
        ('late', dict(epoch=2), 2),
    ):
        log(tmp_path / name, [dict(extra, iter=5, step=5), dict(acc=1.0, step=step)])
    folders = {name: tmp_path / name for name in ('epochs', 'iterations', 'late')}
    out = tmp_path / 'out'
    with pytest.raises(UsageError) as caught:
        import_tool(CURVES).main(['--out', str(out), *(str(folders.get(arg, arg)) for arg in args)])
    assert message in str(caught.value)
    assert not list(tmp_path.glob('out*'))

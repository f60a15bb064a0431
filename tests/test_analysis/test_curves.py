# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import math

import pytest
from matplotlib.figure import Figure
from mmengine.visualization import LocalVisBackend

from mmlinglo.analysis.curves import (
    draw_curves,
    plot_curves,
    read_scalars,
    step_unit,
    summarize,
)


def log(work_dir, timestamp, lines):
    """Write lines as mmengine's LoggerHook does; ``step`` may come from the line."""
    backend = LocalVisBackend(str(work_dir / timestamp / 'vis_data'))
    for line in lines:
        backend.add_scalars(line, step=line['step'])
    return work_dir


def train(step, loss, epoch=None):
    line = dict(lr=0.1, loss=loss, time=0.5, iter=step, step=step)
    return line if epoch is None else dict(line, epoch=epoch)


def val(step, **scalars):
    return dict(scalars, time=0.25, step=step)


def test_training_and_validation_lines(tmp_path):
    log(
        tmp_path,
        '20260101_000000',
        [
            train(10, 3.0, epoch=1),
            train(20, 2.5, epoch=1),
            val(1, **{'accuracy/top1': 40}),
            train(30, 2.0, epoch=2),
            val(2, **{'accuracy/top1': 55.5}),
        ],
    )
    assert read_scalars(tmp_path, 'accuracy/top1') == [(1, 40), (2, 55.5)]
    assert read_scalars(tmp_path, 'loss') == [(10, 3), (20, 2.5), (30, 2)]
    # Both kinds of lines have it: epochs and iterations must not mix.
    assert read_scalars(tmp_path, 'time') == [(10, 0.5), (20, 0.5), (30, 0.5)]
    assert step_unit(tmp_path, 'accuracy/top1') == 'epoch'
    assert step_unit(tmp_path, 'loss') == step_unit(tmp_path, 'time') == 'iteration'
    assert read_scalars(tmp_path / '20260101_000000', 'accuracy/top1') == [(1, 40), (2, 55.5)]


def test_iteration_based_loop(tmp_path):
    log(tmp_path, '20260101_000000', [train(50, 1.0), val(100, mIoU=30.0)])
    assert read_scalars(tmp_path, 'mIoU') == [(100, 30)]
    assert step_unit(tmp_path, 'mIoU') == 'iteration'


def test_resumed_training_is_joined(tmp_path):
    # Killed after epoch 4, resumed from the checkpoint of epoch 2, killed after epoch 3.
    log(tmp_path, '20260101_000000', [val(epoch, acc=epoch) for epoch in (1, 2, 3, 4)])
    log(tmp_path, '20260102_000000', [train(30, 1.0, epoch=3), val(3, acc=30)])
    assert read_scalars(tmp_path, 'acc') == [(1, 1), (2, 2), (3, 30)]
    # A part that ended before its first validation replaces nothing.
    log(tmp_path, '20260103_000000', [train(40, 1.0, epoch=4)])
    assert read_scalars(tmp_path, 'acc') == [(1, 1), (2, 2), (3, 30)]
    log(tmp_path, '20260104_000000', [val(4, acc=40), val(5, acc=50), val(5, acc=51)])
    assert read_scalars(tmp_path, 'acc') == [(1, 1), (2, 2), (3, 30), (4, 40), (5, 51)]
    # A validation outside any training is no part of it.
    log(tmp_path, '20260105_000000', [val(0, acc=99)])
    assert read_scalars(tmp_path, 'acc')[-1] == (5, 51)


def test_unreadable_logs(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'scalars\.json'):
        read_scalars(tmp_path, 'loss')
    log(tmp_path, '20260101_000000', [train(10, 3.0), val(10, mIoU=1.0)])
    with pytest.raises(ValueError, match=r"no scalar 'top1'.*: loss, lr, mIoU, time$"):
        read_scalars(tmp_path, 'top1')
    file = tmp_path / '20260101_000000' / 'vis_data' / 'scalars.json'
    good = file.read_text()
    for bad in ('{"loss": 1.', '[1, 2]', '{"loss": 1.0}'):
        file.write_text(good + bad)
        with pytest.raises(ValueError, match='line 3'):
            read_scalars(tmp_path, 'loss')


def test_summarize():
    runs = [[(1, 10), (2, 20), (3, 99)], [(1, 14), (2, 30)], [(1, 12), (2, math.nan)]]
    first, second = summarize(runs)
    assert first == (1, 12, 10, 14)
    assert second.step == 2
    assert all(map(math.isnan, second[1:]))
    with pytest.raises(ValueError, match='no step in common'):
        summarize([[(1, 10)], [(2, 10)]])


def test_drawing(tmp_path):
    curves = {'b0': [[(1, 10), (2, 20)], [(1, 14), (2, 30)]], 'b1': [[(1, 5), (2, 6)]]}
    axes = Figure().subplots()
    draw_curves(axes, curves, 'epoch', 'accuracy/top1')
    first, second = axes.get_lines()
    assert first.get_xydata().tolist() == [[1, 12], [2, 25]]
    assert second.get_xydata().tolist() == [[1, 5], [2, 6]]
    (band,) = axes.collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert corners == {(1, 10), (2, 20), (1, 14), (2, 30)}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ('epoch', 'accuracy/top1')
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ['b0 (mean and range of 2 runs)', 'b1']

    plot_curves(curves, 'epoch', 'accuracy/top1', tmp_path / 'new' / 'v1.0')
    assert (tmp_path / 'new' / 'v1.0.png').read_bytes().startswith(b'\x89PNG')


def test_diverged_training_is_read(tmp_path):
    log(tmp_path, '20260101_000000', [train(1, 2.0), train(2, math.nan)])
    first, second = read_scalars(tmp_path, 'loss')
    assert first == (1, 2)
    assert math.isnan(second[1])

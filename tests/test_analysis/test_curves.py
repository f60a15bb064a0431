# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import math

import pandas as pd
import pytest
from matplotlib.figure import Figure
from mmengine.visualization import LocalVisBackend

from mmlinglo.analysis.curves import common_steps, draw_curves, read_scalars


def log(work_dir, timestamp, lines):
    """Write lines as mmengine's LoggerHook does; ``step`` comes from the line."""
    backend = LocalVisBackend(str(work_dir / timestamp / 'vis_data'))
    for line in lines:
        backend.add_scalars(line, step=line['step'])
    return work_dir


def train(step, loss, epoch=None):
    line = dict(lr=0.1, loss=loss, time=0.5, iter=step, step=step)
    return line if epoch is None else dict(line, epoch=epoch)


def val(step, **scalars):
    return dict(scalars, time=0.25, step=step)


def points(work_dir, key):
    frame = read_scalars(work_dir, key)
    return list(zip(frame.step, frame.value)), *set(frame.unit)


def test_training_and_validation_lines(tmp_path):
    lines = [train(10, 3.0, epoch=1), train(20, 2.5, epoch=1), val(1, **{'accuracy/top1': 40})]
    lines += [train(30, 2.0, epoch=2), val(2, **{'accuracy/top1': 55.5})]
    log(tmp_path, '20260101_000000', lines)
    accuracy = ([(1, 40), (2, 55.5)], 'epoch')
    assert points(tmp_path, 'accuracy/top1') == accuracy
    assert points(tmp_path, 'loss') == ([(10, 3), (20, 2.5), (30, 2)], 'iteration')
    # Both kinds of lines have it: epochs and iterations must not mix.
    assert points(tmp_path, 'time') == ([(10, 0.5), (20, 0.5), (30, 0.5)], 'iteration')
    assert points(tmp_path / '20260101_000000', 'accuracy/top1') == accuracy


def test_iteration_based_loop(tmp_path):
    log(tmp_path, '20260101_000000', [train(50, 1.0), val(100, mIoU=30.0)])
    assert points(tmp_path, 'mIoU') == ([(100, 30)], 'iteration')


def test_resumed_training_is_joined(tmp_path):
    # Killed after epoch 4, resumed from the checkpoint of epoch 2, killed after epoch 3.
    log(tmp_path, '20260101_000000', [val(epoch, acc=epoch) for epoch in (1, 2, 3, 4)])
    log(tmp_path, '20260102_000000', [train(30, 1.0, epoch=3), val(3, acc=30)])
    assert points(tmp_path, 'acc')[0] == [(1, 1), (2, 2), (3, 30)]
    # A part that ended before its first validation replaces nothing.
    log(tmp_path, '20260103_000000', [train(40, 1.0, epoch=4)])
    assert points(tmp_path, 'acc')[0] == [(1, 1), (2, 2), (3, 30)]
    log(tmp_path, '20260104_000000', [val(4, acc=40), val(5, acc=50), val(5, acc=51)])
    assert points(tmp_path, 'acc')[0] == [(1, 1), (2, 2), (3, 30), (4, 40), (5, 51)]
    # A validation outside any training is no part of it.
    log(tmp_path, '20260105_000000', [val(0, acc=99)])
    assert points(tmp_path, 'acc')[0][-1] == (5, 51)


def test_unreadable_logs(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'scalars\.json'):
        read_scalars(tmp_path, 'loss')
    log(tmp_path, '20260101_000000', [train(10, 3.0), val(10, mIoU=1.0)])
    with pytest.raises(ValueError, match=r"no scalar 'top1'.*: loss, lr, mIoU, time$"):
        read_scalars(tmp_path, 'top1')
    file = tmp_path / '20260101_000000' / 'vis_data' / 'scalars.json'
    good = file.read_text()
    for bad in ('{"loss": 1.', '[1, 2]', '{"loss": 1.0}', '{"loss": 1.0, "step": "x"}'):
        file.write_text(f'{good}{bad}\n')
        with pytest.raises(ValueError, match=r'scalars\.json.* is no log, or a damaged one'):
            read_scalars(tmp_path, 'loss')


def test_half_a_line_at_the_end(tmp_path):
    log(tmp_path, '20260101_000000', [train(10, 3.0), train(20, 2.0)])
    file = tmp_path / '20260101_000000' / 'vis_data' / 'scalars.json'
    file.write_text(file.read_text() + '{"loss": 1.')
    assert points(tmp_path, 'loss') == ([(10, 3), (20, 2)], 'iteration')


def frame(**runs):
    """Runs of labels: lists of lists of (step, value)."""
    rows = [
        dict(label=label, run=f'{label}{number}', step=step, value=value)
        for label, several in runs.items()
        for number, run in enumerate(several)
        for step, value in run
    ]
    return pd.DataFrame(rows)


def test_steps_that_all_runs_have():
    runs = frame(a=[[(1, 10), (2, 20), (3, 99)], [(1, 14), (2, 30)], [(1, 12), (2, math.nan)]])
    found = common_steps(runs)
    assert sorted(found[found.step == 1].value) == [10, 12, 14]
    assert found[found.step == 2].value.isna().all()
    assert set(found.step) == {1, 2}
    with pytest.raises(ValueError, match="'b': the runs of one curve have no step in common"):
        common_steps(frame(a=[[(1, 1)]], b=[[(1, 10)], [(2, 10)]]))


def test_drawing():
    runs = frame(b0=[[(1, 10), (2, 20)], [(1, 14), (2, 30)]], b1=[[(1, 5), (2, 6)]])
    axes = Figure().subplots()
    draw_curves(axes, runs, 'Epoch', 'accuracy/top1')
    first, second = (line.get_xydata().tolist() for line in axes.get_lines()[:2])
    assert first == [[1, 12], [2, 25]]
    assert second == [[1, 5], [2, 6]]
    corners = {tuple(point) for point in axes.collections[0].get_paths()[0].vertices.tolist()}
    assert corners == {(1, 10), (2, 20), (1, 14), (2, 30)}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ('Epoch', 'accuracy/top1')
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ['b0 (mean and range of 2 runs)', 'b1']


def test_diverged_training_is_read(tmp_path):
    log(tmp_path, '20260101_000000', [train(1, 2.0), train(2, math.nan)])
    first, second = points(tmp_path, 'loss')[0]
    assert first == (1, 2)
    assert math.isnan(second[1])

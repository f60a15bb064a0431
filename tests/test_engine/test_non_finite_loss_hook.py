# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import copy
import re
from functools import partial
from math import inf

import numpy as np
import pytest
import torch
from mmengine.optim.optimizer import amp_optimizer_wrapper
from toy import Recorder, Toy, build_runner

from mmlinglo.engine import NonFiniteLossHook, TrainingError


def nan_inputs(*iterations):
    """NaN in the picture, and so in the statistics of the batch norm, at these iterations."""
    return lambda _, i, inputs: inputs * float('nan') if i in iterations else inputs


def run(work_dir, poison, hook, **kwargs):
    recorder = Recorder()
    runner = build_runner(work_dir, poison=poison, hooks=[recorder, hook], **kwargs)
    runner.train()
    return runner, recorder


def is_finite(state):
    return all(value.isfinite().all() for value in state.values() if value.is_floating_point())


def test_stop_names_iteration_rate_and_last_checkpoint(tmp_path):
    message = (
        f'loss is nan at iteration 5 on rank 0 (lr 0.0983; last checkpoint: {tmp_path}/epoch_1.pth)'
    )
    with pytest.raises(TrainingError, match=re.escape(message)):
        run(tmp_path, nan_inputs(5), NonFiniteLossHook())
    assert sorted(p.name for p in tmp_path.glob('*.pth')) == ['epoch_1.pth']


def test_stop_before_the_first_checkpoint(tmp_path):
    with pytest.raises(TrainingError, match='last checkpoint: none'):
        run(tmp_path, nan_inputs(1), NonFiniteLossHook())


def test_stop_tells_the_first_one_between_two_checks(tmp_path, monkeypatch):
    """As on a GPU, where only every n-th iteration and each checkpoint waits for the result."""
    hook = NonFiniteLossHook(interval=100)
    check = hook._check
    # the check of a CPU's loss in each iteration has outputs; the checkpoint's has none
    monkeypatch.setattr(hook, '_check', lambda runner, outputs=None: outputs or check(runner))
    with pytest.raises(TrainingError, match='not finite at iteration 5 on rank 0'):
        run(tmp_path, nan_inputs(5), hook)
    assert sorted(p.name for p in tmp_path.glob('*.pth')) == ['epoch_1.pth']


def infinite_weights(model, iteration, inputs):
    """A gradient that overflows while the loss is finite, in the last iteration of an epoch."""
    if iteration == 6:
        model.layers[0].weight.register_hook(lambda grad: grad * float('inf'))
    return inputs


def test_weights_are_looked_at_before_they_are_saved(tmp_path):
    with pytest.raises(TrainingError, match=r'layers\.0\.weight is not finite .* it was not saved'):
        run(tmp_path, infinite_weights, NonFiniteLossHook())
    assert sorted(p.name for p in tmp_path.glob('*.pth')) == ['epoch_1.pth']
    assert (tmp_path / 'last_checkpoint').read_text().endswith('epoch_1.pth')


def test_without_the_hook_they_are_saved_and_called_the_best(tmp_path):
    """Otherwise the tests above would show nothing."""
    checkpoint = dict(save_best='score', rule='greater')
    run(tmp_path, nan_inputs(5), Recorder(), checkpoint=checkpoint, scores=[1, 2])
    state = torch.load(tmp_path / 'best_score_epoch_4.pth', weights_only=False)['state_dict']
    assert not is_finite(state)


@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('poison', [nan_inputs(5), infinite_weights], ids=['loss', 'gradient'])
def test_skip_leaves_out_that_step_only(poison, accumulate, tmp_path):
    """Weights and optimizer stay as they are in that step, and change in all others."""
    states = []

    class Watch(Recorder):
        def after_train_iter(self, runner, *args, **kwargs):
            super().after_train_iter(runner, *args, **kwargs)
            states.append(copy.deepcopy(runner.model.state_dict()))

    def once(model, iteration, inputs):
        inputs = poison(model, iteration, inputs)
        if iteration == 7 and poison is infinite_weights:
            model.layers[0].weight._backward_hooks.clear()
        return inputs

    wrapper = dict(optimizer=dict(type='AdamW', lr=0.1), accumulative_counts=accumulate)
    watch = Watch()
    build_runner(
        tmp_path, poison=once, hooks=[NonFiniteLossHook('skip'), watch], optim_wrapper=wrapper
    ).train()
    assert all(is_finite(state) for state in states)
    changed = [
        i + 1
        for i in range(1, 12)
        if not torch.equal(states[i]['layers.0.weight'], states[i - 1]['layers.0.weight'])
    ]
    left_out = (5 if poison is not infinite_weights else 6) if accumulate == 1 else 6
    assert changed == [i for i in range(2, 13) if i % accumulate == 0 and i != left_out]


def test_a_step_that_is_made_is_not_called_skipped(tmp_path):
    """The loss is infinite, but its gradients are finite."""

    class Shifted(Toy):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            return dict(loss=outputs['loss'] + (inf if self.iteration == 5 else 0))

    runner = build_runner(tmp_path, model=Shifted(), hooks=[NonFiniteLossHook('skip')])
    texts = []
    runner.logger.warning = texts.append
    runner.train()
    (text,) = (text for text in texts if 'loss is inf at iteration 5' in text)
    assert text.endswith('the step is made, since its gradients are finite')


def test_skip_changes_nothing_else(tmp_path):
    """Bitwise the same training, if all is finite."""
    plain, _ = run(tmp_path / 'a', None, Recorder())
    watched, _ = run(tmp_path / 'b', None, NonFiniteLossHook('skip'))
    for key, value in plain.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[key]), key


def test_skip_gives_up(tmp_path):
    with pytest.raises(TrainingError, match=r'loss is nan at iteration 8 .* more than 3 such'):
        run(tmp_path, nan_inputs(*range(5, 13)), NonFiniteLossHook('skip', max_skips=3))


def test_skip_counts_in_a_row(tmp_path):
    run(tmp_path, nan_inputs(2, 3, 5, 6, 9), NonFiniteLossHook('skip', max_skips=2))


@pytest.fixture
def amp_on_the_cpu(monkeypatch):
    """mmengine's wrapper for mixed precision, with torch's gradient scaler for the CPU."""
    scaler = pytest.importorskip('torch.amp').__dict__.get('GradScaler')
    if scaler is None:
        pytest.skip('torch has no gradient scaler for the CPU')
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(amp_optimizer_wrapper, 'GradScaler', partial(scaler, device='cpu'))
    return dict(type='AmpOptimWrapper', dtype='bfloat16', optimizer=dict(type='AdamW', lr=0.1))


@pytest.mark.parametrize('clip_grad', [None, dict(max_norm=1.0)])
def test_skip_with_mixed_precision(amp_on_the_cpu, clip_grad, tmp_path):
    """The gradient scaler leaves the step out before the optimizer sees it."""
    wrapper = dict(amp_on_the_cpu, clip_grad=clip_grad)
    runner, recorder = run(
        tmp_path, nan_inputs(2, 3, 5), NonFiniteLossHook('skip', max_skips=2), optim_wrapper=wrapper
    )
    assert sum(np.isnan(loss) for loss in recorder.losses.values()) == 3
    assert is_finite(runner.model.state_dict())


def test_skip_with_mixed_precision_gives_up(amp_on_the_cpu, tmp_path):
    hook = NonFiniteLossHook('skip', max_skips=3)
    with pytest.raises(TrainingError, match=r'loss is nan at iteration 8 .* more than 3 such'):
        run(tmp_path, nan_inputs(*range(5, 13)), hook, optim_wrapper=amp_on_the_cpu)


def test_infinite_buffers_are_allowed(tmp_path):
    """Such as attention masks."""

    def add_mask(model, iteration, inputs):
        if iteration == 1:
            model.register_buffer('mask', torch.tensor([0.0, -float('inf')]))
        return inputs

    run(tmp_path, add_mask, NonFiniteLossHook())
    state = torch.load(tmp_path / 'epoch_4.pth', weights_only=False)['state_dict']
    assert state['mask'].isinf().any()


def test_unknown_action():
    with pytest.raises(ValueError, match="'stop' or 'skip', got 'hope'"):
        NonFiniteLossHook('hope')

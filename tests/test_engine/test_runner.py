# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""What TrainingRunner refuses to resume, and how it fits schedules and learning rates."""

import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.hooks import EarlyStoppingHook
from mmengine.optim import LinearLR
from torch import nn
from toy import Recorder, Toy, build_runner

from mmlinglo.engine import ReseedHook, TrainingError, fit_schedulers
from mmlinglo.utils import CheckpointError

WARM_UP = dict(type='LinearLR', start_factor=0.01, begin=0, end=100, by_epoch=False)
POLY = dict(type='PolyLR', begin=100, end=1000, by_epoch=False)
STEPS = dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[8, 11])
COSINE = dict(type='CosineAnnealingLR', T_max=295, begin=5, end=300, by_epoch=True)

DROPS = dict(type='StepLR', begin=0, end=100, by_epoch=True)
RESTARTS = dict(type='CosineRestartLR', begin=10, end=100, by_epoch=True, restart_weights=[1, 0.5])
CYCLE = dict(type='OneCycleLR', begin=0, end=100, by_epoch=True, eta_max=0.1)


def test_a_long_enough_training_keeps_its_schedule():
    schedulers = [WARM_UP, POLY, STEPS, COSINE]
    for lengths in ({True: 300, False: 1000}, {True: 10**6, False: 10**6}):
        assert fit_schedulers(schedulers, lengths) == schedulers


@pytest.mark.parametrize(
    ('schedulers', 'lengths', 'expected'),
    [
        ([WARM_UP, POLY], {False: 50}, [dict(WARM_UP, end=5), dict(POLY, begin=5, end=50)]),
        ([WARM_UP, POLY], {False: 5}, [dict(WARM_UP, end=1), dict(POLY, begin=1, end=5)]),
        ([WARM_UP, POLY], {False: 1}, [dict(WARM_UP, end=1)]),
        ([WARM_UP, POLY], {False: 500}, [WARM_UP, dict(POLY, end=500)]),
        ([dict(WARM_UP, type=LinearLR)], {False: 20}, [dict(WARM_UP, type=LinearLR, end=2)]),
        # another unit than the loop's
        ([STEPS], {False: 5}, [STEPS]),
        ([WARM_UP, STEPS], {True: 6, False: 60}, [dict(WARM_UP, end=6), dict(STEPS, end=6, milestones=[4, 5])]),
        ([STEPS], {True: 1, False: 3}, [dict(STEPS, end=1, milestones=[])]),
        ([STEPS], {True: 2, False: 3}, [dict(STEPS, end=2, milestones=[1])]),
        ([COSINE], {True: 64, False: 9}, [dict(COSINE, end=64, T_max=59)]),
        ([COSINE], {True: 5, False: 9}, []),
        ([dict(DROPS, step_size=30)], {True: 10}, [dict(DROPS, step_size=3, end=10)]),
        ([dict(RESTARTS, periods=[40, 50])], {True: 19}, [dict(RESTARTS, periods=[4, 5], end=19)]),
        ([dict(CYCLE, total_steps=100)], {True: 7}, [dict(CYCLE, total_steps=7, end=7)]),
        ([CYCLE], {True: 7}, [dict(CYCLE, end=7)]),
        # a decay, not a warm-up
        ([dict(WARM_UP, start_factor=1.0, end_factor=0.1)], {False: 50},
         [dict(WARM_UP, start_factor=1.0, end_factor=0.1, end=50)]),
    ],
)  # fmt: skip
def test_a_short_training_has_all_of_its_schedule(schedulers, lengths, expected):
    before = [dict(each) for each in schedulers]
    assert fit_schedulers(schedulers, lengths) == expected
    assert schedulers == before


@pytest.mark.parametrize('length', [1, 2, 5])
@pytest.mark.parametrize(
    'recipe', sorted(p.stem for p in (ROOT / 'configs/_base_/schedules').glob('*.py'))
)
def test_schedules_survive_a_short_training(recipe, length, tmp_path):
    cfg = Config.fromfile(ROOT / f'configs/_base_/schedules/{recipe}.py')
    runner = build_runner(
        tmp_path,
        by_epoch='max_epochs' in cfg.train_cfg,
        length=length,
        param_scheduler=cfg.param_scheduler,
    )
    runner.train()
    for scheduler in runner.param_schedulers:
        assert scheduler.end > scheduler.begin


def test_accumulated_batches_count_for_the_learning_rate(tmp_path):
    rates = []
    for count in (1, 4):
        runner = build_runner(
            tmp_path,
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.1), accumulative_counts=count),
            auto_scale_lr=dict(enable=True, base_batch_size=32),
        )
        runner.train()
        rates.append(runner.optim_wrapper.param_groups[0]['initial_lr'])
    # batches of 4
    assert rates == pytest.approx([0.1 * 4 / 32, 0.1 * 16 / 32])


class OtherToy(Toy):
    """Another number of outputs."""

    def __init__(self):
        super().__init__()
        self.layers[-1] = nn.Linear(8, 2).double()


def test_another_model_is_not_resumed(tmp_path):
    build_runner(tmp_path / 'first').train()
    checkpoint = str(tmp_path / 'first/epoch_2.pth')
    with pytest.raises(CheckpointError, match=r'\(1, 8\) instead of \(2, 8\).*load_from='):
        build_runner(
            tmp_path / 'second', model=OtherToy(), load_from=checkpoint, resume=True
        ).train()
    groups = dict(
        optimizer=dict(type='AdamW', lr=0.1, weight_decay=0.05),
        paramwise_cfg=dict(norm_decay_mult=0.0),
    )
    with pytest.raises(
        CheckpointError,
        match=r'parameter group.*same model, optimizer and paramwise_cfg.*load_from=',
    ):
        build_runner(
            tmp_path / 'third', optim_wrapper=groups, load_from=checkpoint, resume=True
        ).train()
    recorder = Recorder()
    build_runner(
        tmp_path / 'fourth', model=OtherToy(), load_from=checkpoint, hooks=[recorder]
    ).train()  # as weights to start from
    assert len(recorder.losses) == 12


@pytest.mark.parametrize('save_best', [None, 'score'])
@pytest.mark.parametrize('stop_after', [2, 4])
def test_early_stopping_is_resumed(save_best, stop_after, tmp_path):
    """Early stopping at epoch 4, resumed after epoch 2 or after it had stopped."""
    scores = [50.0, 40.0, 45.0, 20.0, 90.0, 25.0]

    def run(folder, scores, **kwargs):
        stopping = EarlyStoppingHook(monitor='score', rule='greater', patience=3)
        runner = build_runner(
            folder, length=6, val_interval=1, scores=scores, hooks=[stopping, ReseedHook()],
            checkpoint=dict(save_best=save_best, rule='greater') if save_best else None, **kwargs,
        )  # fmt: skip
        runner.train()
        return runner, stopping

    runner, stopping = run(tmp_path / 'whole', scores)
    assert (runner.epoch, stopping.best_score, stopping.wait_count) == (4, 50.0, 3)

    # the validation of the resumed epoch is repeated
    resumed, again = run(
        tmp_path / 'resumed',
        scores[stop_after - 1 :],
        load_from=str(tmp_path / f'whole/epoch_{stop_after}.pth'),
        resume=True,
    )
    assert (resumed.epoch, again.best_score, again.wait_count) == (4, 50.0, 3)
    for key, value in runner.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key])


@pytest.mark.parametrize(
    ('scores', 'save_best'),
    [([5.0, 4.0, 3.0, 2.0], None), ([5.0, 6.0, 6.0, 6.0], 'score')],
)
def test_a_rate_that_follows_a_metric_is_resumed(scores, save_best, tmp_path):
    """A validation is missing in the checkpoint before it, unless it was the best and saved again."""
    kwargs = dict(
        checkpoint=dict(save_best=save_best, rule='greater') if save_best else None,
        val_interval=1,
        param_scheduler=dict(
            type='ReduceOnPlateauLR', monitor='score', rule='greater', patience=1, by_epoch=True
        ),
    )
    whole = build_runner(tmp_path / 'whole', scores=scores, **kwargs)
    whole.train()
    checkpoint = str(tmp_path / 'whole/epoch_2.pth')
    resumed = build_runner(
        tmp_path / 'resumed', scores=scores[1:], load_from=checkpoint, resume=True, **kwargs
    )
    resumed.train()
    rates = [each.optim_wrapper.get_lr()['lr'][0] for each in (whole, resumed)]
    assert rates[0] == rates[1] == pytest.approx(0.1 if save_best else 0.01)


def test_an_optimizer_of_no_such_name(tmp_path):
    runner = build_runner(tmp_path, optim_wrapper=dict(optimizer=dict(type='AdamWW', lr=0.1)))
    with pytest.raises(TrainingError, match="no optimizer is called 'AdamWW'"):
        runner.train()


@pytest.mark.parametrize('by_epoch', [True, False])
def test_fewer_samples_than_a_batch(by_epoch, tmp_path):
    runner = build_runner(tmp_path, by_epoch=by_epoch)
    runner._train_dataloader.update(batch_size=64, drop_last=True)
    with pytest.raises(TrainingError, match='no batch: 10 samples, batch_size=64, drop_last=True'):
        runner.train()


def test_files_with_weights_alone_cannot_be_resumed(tmp_path):
    whole = build_runner(
        tmp_path / 'whole', checkpoint=dict(save_best='score', rule='greater'), scores=[1.0, 2.0]
    )
    whole.train()
    torch.save(whole.model.state_dict(), tmp_path / 'bare.pth')
    for path in ((tmp_path / 'whole').glob('best_*.pth').__next__(), tmp_path / 'bare.pth'):
        runner = build_runner(tmp_path / 'resumed', load_from=str(path), resume=True)
        with pytest.raises(CheckpointError, match=r'has no .*optimizer.*load_from='):
            runner.train()


@pytest.mark.parametrize('length', [4, 2])
def test_another_length_keeps_the_schedule_and_is_reported(length, tmp_path):
    steps = dict(type='MultiStepLR', milestones=[2, 3], end=4, by_epoch=True)
    kwargs = dict(val_interval=1, param_scheduler=steps)
    build_runner(tmp_path / 'first', length=length, **kwargs).train()
    warnings = []
    runner = build_runner(
        tmp_path / 'longer',
        length=5,
        load_from=str(tmp_path / 'first/epoch_1.pth'),
        resume=True,
        **kwargs,
    )
    runner.logger.warning = warnings.append
    runner.train()
    found = [text for text in warnings if 'learning rate continues' in text]
    assert len(found) == (1 if length == 2 else 0)

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""A training of milliseconds that draws from every random generator."""

import itertools
import random
from unittest import mock

import numpy as np
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement
from torch import nn
from torch.utils.data import Dataset

from mmlinglo.engine import TrainingRunner

NUMBERS = itertools.count()  # mmengine keeps loggers and message hubs by name
SIZE = 10  # samples: three batches of 4, the last one smaller


class Noisy(Dataset):
    """Sample i: its number, and one random number of each generator."""

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        drawn = [random.random(), np.random.rand(), torch.rand(()).item()]
        return dict(inputs=torch.tensor([index, *drawn], dtype=torch.float64))


class Toy(BaseModel):
    """A network with batch norm and dropout.

    Args:
        poison: Called with the model, the number of the training iteration and
            the inputs; returns the inputs to use.
    """

    def __init__(self, poison=None):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)
        ).double()
        self.poison = poison
        self.iteration = 0

    def forward(self, inputs, mode='tensor'):  # noqa: ARG002
        self.iteration += 1
        inputs = torch.stack(inputs)
        if self.poison is not None:
            inputs = self.poison(self, self.iteration, inputs)
        return dict(loss=self.layers(inputs).square().mean())

    def val_step(self, data):
        torch.rand(len(data['inputs']))  # a validation that draws random numbers
        return [BaseDataElement()]


class Score(BaseMetric):
    """The given scores, one for each validation."""

    def __init__(self, scores=()):
        super().__init__()
        self.scores = list(scores)

    def process(self, data_batch, data_samples):  # noqa: ARG002
        self.results.append(0)

    def compute_metrics(self, results):  # noqa: ARG002
        return dict(score=self.scores.pop(0)) if self.scores else {}


class Recorder(Hook):
    """Loss and data of each iteration, epochs or iterations of the validations."""

    def __init__(self):
        self.losses, self.data, self.validations = {}, {}, []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):  # noqa: ARG002
        self.losses[runner.iter] = outputs['loss'].item()
        self.data[runner.iter] = torch.stack(data_batch['inputs'])

    def before_val(self, runner):
        self.validations.append((runner.epoch, runner.iter))


class ToyRunner(TrainingRunner):
    def _log_env(self, env_cfg):
        """Nothing: it starts compilers to learn their versions."""

    def train(self):
        with (
            mock.patch('os.fsync'),  # seconds each, when others write to the disk
            mock.patch('torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL', 0.5),
        ):
            super().train()
            # Ends persistent workers here, not in a later run. Some do not end by themselves: torch
            # stops them after the interval, which is 5 seconds for each by default.
            self.train_dataloader._iterator = None


def build_runner(
    work_dir,
    *,
    by_epoch=True,
    length=None,
    workers=0,
    persistent=False,
    seed=3,
    hooks=(),
    checkpoint=None,
    scores=(),
    val_interval=None,
    poison=None,
    optim_wrapper=None,
    param_scheduler=None,
    auto_scale_lr=None,
    model=None,
    resume=False,
    load_from=None,
    logger=None,
    visualizer=None,
):
    """4 epochs of 3 iterations or 12 iterations, validated twice, a checkpoint every quarter."""
    loader = dict(
        batch_size=4,
        num_workers=workers,
        persistent_workers=persistent,
        dataset=Noisy(),
        sampler=dict(type='DefaultSampler' if by_epoch else 'InfiniteSampler', shuffle=True),
    )
    length = length or (4 if by_epoch else 12)
    torch.manual_seed(0)  # of the weights
    return ToyRunner(
        model or Toy(poison),
        str(work_dir),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=length, val_interval=val_interval or 2)
        if by_epoch
        else dict(by_epoch=False, max_iters=length, val_interval=val_interval or 6),
        optim_wrapper=optim_wrapper or dict(optimizer=dict(type='AdamW', lr=0.1)),
        param_scheduler=param_scheduler
        or dict(type='CosineAnnealingLR', by_epoch=by_epoch, T_max=12),
        auto_scale_lr=auto_scale_lr,
        val_dataloader=dict(
            batch_size=4,
            dataset=Noisy(),
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        val_cfg=dict(),
        val_evaluator=Evaluator([Score(scores)]),
        default_hooks=dict(
            checkpoint=dict(
                type='mmlinglo.SafeCheckpointHook',
                by_epoch=by_epoch,
                interval=1 if by_epoch else 3,
                **(checkpoint or {}),
            ),
            logger=logger,
        ),
        custom_hooks=list(hooks),
        randomness=dict(seed=seed),
        load_from=load_from,
        resume=resume,
        visualizer=visualizer,
        log_level='ERROR',
        experiment_name=f'toy_{next(NUMBERS)}',
    )

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from functools import partial
from typing import Optional

import numpy as np
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import EpochBasedTrainLoop, Runner, set_random_seed
from torch.utils.data import DataLoader

from mmlinglo.registry import HOOKS


@HOOKS.register_module()
class ReseedHook(Hook):
    """Make a resumed training equal to an uninterrupted one.

    A checkpoint of mmengine holds weights, optimizer, schedulers, counters and
    the seed, but no state of a random generator. Drop path and augmentations
    of a resumed run therefore start over with the random numbers of the first
    epoch, and without a seed in the config the data are shuffled by a new
    one. This hook makes the random numbers a function of the seed and of the
    position: it seeds Python, numpy and torch, and starts new data workers
    that are seeded likewise, wherever a run can be resumed. That is each epoch
    of an epoch-based schedule, and each iteration at which an iteration-based
    one writes its regular checkpoint.

    What is reproduced, bitwise where the operations themselves are
    deterministic (float32 on the CPU is): the weights, the loss curve and
    the order and augmentation of the data, whether ``randomness.seed`` was set
    or drawn by mmengine, if the run is resumed from a regular checkpoint with
    the same config, number of processes and number of workers.

    What is not:

    - A run resumed from an iteration that is not a multiple of the checkpoint
      interval, or from a checkpoint in the middle of an epoch: mmengine
      starts that epoch over.
    - Iteration-based schedules in the original mmengine 0.10.7, which loads
      and drops all data up to the iteration, with ``num_workers=0`` or
      without a seed in the config (new shuffle; no image is dropped or
      repeated but in the pass over the data that was interrupted).
    - Iteration-based schedules whose sampler has no ``skip``, such as
      ``DefaultSampler``, and loaders whose ``worker_init_fn`` takes no
      ``seed``: the augmentation by the workers differs.
    - A validation that was interrupted, without ``SafeCheckpointHook``, which
      repeats it: mmengine goes on after it.
    - GPU kernels that are not deterministic (see ``randomness.deterministic``).

    New workers cost what starting them costs, per epoch or checkpoint;
    ``persistent_workers`` keeps its effect between the checkpoints of an
    iteration-based schedule only.
    """

    priority = 'LOWEST'  # after the checkpoint and after mmengine's DistSamplerSeedHook

    def __init__(self) -> None:
        self._step: Optional[int] = None  # epoch or iteration of the last seeding

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed at the start of an epoch, or of an iteration-based run."""
        loop = runner.train_loop
        if isinstance(loop, EpochBasedTrainLoop):
            self._seed(runner, runner.epoch)
            _restart_workers(loop.dataloader, self._seed_at(runner, runner.epoch))
            _set_sampler_seed(runner, loop.dataloader)
        else:
            self._seed(runner, runner.iter)
            self._seek(runner, runner.iter)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,  # noqa: ARG002
        data_batch: Optional[dict] = None,  # noqa: ARG002
        outputs: Optional[dict] = None,  # noqa: ARG002
    ) -> None:
        """Seed where an iteration-based run can be resumed."""
        if isinstance(runner.train_loop, EpochBasedTrainLoop) or not self._is_saved_now(runner):
            return
        self._seed(runner, runner.iter + 1)
        self._seek(runner, runner.iter + 1)

    def after_val(self, runner: Runner) -> None:
        """Seed again: a resumed run does not repeat the validation behind the checkpoint."""
        if not isinstance(runner.train_loop, EpochBasedTrainLoop) and self._step == runner.iter:
            self._seed(runner, runner.iter)

    def _is_saved_now(self, runner: Runner) -> bool:
        """Whether the checkpoint hook's interval ends with this iteration."""
        return any(
            not hook.by_epoch and self.every_n_train_iters(runner, hook.interval, hook.save_begin)
            for hook in runner.hooks
            if isinstance(hook, CheckpointHook)
        )

    @staticmethod
    def _seed_at(runner: Runner, step: int) -> int:
        """Seed of an epoch or iteration; the workers of all ranks add their numbers to it."""
        # Sums of seed and step would give neighbouring epochs the same random numbers.
        return int(np.random.SeedSequence((runner.seed, step)).generate_state(1)[0]) >> 1

    def _seed(self, runner: Runner, step: int) -> None:
        set_random_seed(self._seed_at(runner, step))
        self._step = step

    def _seek(self, runner: Runner, iteration: int) -> None:
        """New workers that start with the data of an iteration, if mmengine and sampler can."""
        loop = runner.train_loop
        iterator = getattr(loop, 'dataloader_iterator', None)
        # The original mmengine has neither; its workers run on, and a resumed run replays them.
        if hasattr(iterator, 'skip_iter') and hasattr(loop.dataloader.sampler, 'skip'):
            _set_sampler_seed(runner, loop.dataloader)
            _restart_workers(loop.dataloader, self._seed_at(runner, iteration))
            iterator.skip_iter(iteration)


def _set_sampler_seed(runner: Runner, dataloader: DataLoader) -> None:
    """Shuffle with the seed of the first run, which resuming restores too late for the sampler."""
    if runner._randomness_cfg.get('diff_rank_seed'):
        return  # the runner's seed is this rank's own; the ranks must shuffle alike
    sampler = getattr(dataloader.batch_sampler, 'sampler', dataloader.sampler)
    if getattr(sampler, 'seed', None) is not None:
        sampler.seed = runner.seed


def _restart_workers(dataloader: DataLoader, seed: int) -> None:
    """Let the next iteration start new workers, seeded from ``seed``."""
    dataloader._iterator = None  # the persistent workers, if there are any
    init_fn = dataloader.worker_init_fn
    if isinstance(init_fn, partial) and 'seed' in init_fn.keywords:
        keywords = {**init_fn.keywords, 'seed': seed}
        dataloader.worker_init_fn = partial(init_fn.func, *init_fn.args, **keywords)

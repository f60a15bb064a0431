# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import random
from contextlib import contextmanager
from typing import Any, Iterator, List, Optional, Tuple

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import EpochBasedTrainLoop, Runner, set_random_seed
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, get_worker_info

from mmlinglo.registry import HOOKS


@HOOKS.register_module()
class ReseedHook(Hook):
    """Make a resumed training equal to an uninterrupted one.

    mmengine's checkpoints hold the weights, optimizer, schedulers, counters and seed, but no
    state of a random generator. So drop path and augmentations of a resumed run start over with
    the random numbers of the first epoch. Without a seed in the config, a new seed shuffles the
    data. This hook makes the random numbers depend only on the seed and on the position in the
    training. It seeds Python, numpy and torch

    - in the training process, wherever you can resume a run: at each epoch of an epoch-based
      schedule, and at each iteration at which an iteration-based schedule writes its regular
      checkpoint;
    - where data are loaded, at each batch, by the number of the batch. The number of data workers
      does not matter, nor that they survive all epochs with ``persistent_workers``.

    The hook reproduces the weights, the loss curve, and the order and augmentation of the data.
    They are equal bit by bit where the operations are deterministic (float32 on the CPU is). It
    does not matter whether you set ``randomness.seed`` or mmengine drew it. Resume from a regular
    checkpoint, with the same config and number of processes.

    The hook does not reproduce:

    - A run resumed from an iteration that is not a multiple of the checkpoint interval, or from a
      checkpoint in the middle of an epoch: mmengine starts that epoch over.
    - Data of an ``IterableDataset``, and of loaders without batches (``batch_size=None``).
    - An interrupted validation: mmengine continues after it. ``SafeCheckpointHook`` repeats it.
    - GPU kernels that are not deterministic (see ``randomness.deterministic``).
    """

    priority = 'LOWEST'  # after the checkpoint and after mmengine's DistSamplerSeedHook

    def __init__(self) -> None:
        self._step: Optional[int] = None  # epoch or iteration of the last seeding
        self._batches: Optional[_SeededBatches] = None

    def before_train(self, runner: Runner) -> None:
        """Make the data loader use a seed for each batch."""
        loader = runner.train_loop.dataloader
        if loader.batch_sampler is None:
            return
        self._batches = _SeededBatches(loader.batch_sampler)
        # DataLoader refuses to set this attribute
        vars(loader)['batch_sampler'] = self._batches
        if not isinstance(loader.dataset, IterableDataset):
            loader.dataset.__getitems__ = _SeededItems(loader.dataset)
        if loader.generator is None:
            # a new iterator draws from it; with persistent workers, there is no new iterator
            loader.generator = torch.Generator()
        loader._iterator = None  # workers that were started before
        _set_sampler_seed(runner, loader)

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed at the start of an epoch, or of an iteration-based run."""
        loop = runner.train_loop
        if isinstance(loop, EpochBasedTrainLoop):
            self._seed(runner, runner.epoch)
            if self._batches is not None:
                self._batches.seek(runner.seed, runner.epoch)
            return
        self._seed(runner, runner.iter)
        if self._batches is not None:
            iterator = loop.dataloader_iterator
            # Otherwise mmengine loads and drops all batches up to this one, which counts them.
            skips = hasattr(iterator, 'skip_iter') and hasattr(loop.dataloader.sampler, 'skip')
            self._batches.seek(runner.seed, 0, runner.iter if skips else 0)
            if iterator._iterator is not None:  # the original mmengine has already started to load
                sampler = loop.dataloader.sampler
                if hasattr(sampler, '_indices_of_rank'):
                    sampler.indices = sampler._indices_of_rank()
                iterator._iterator = iter(loop.dataloader)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Optional[dict] = None,
        outputs: Optional[dict] = None,
    ) -> None:
        """Seed wherever an iteration-based run can be resumed."""
        if not isinstance(runner.train_loop, EpochBasedTrainLoop) and self._is_saved_now(runner):
            self._seed(runner, runner.iter + 1)

    def after_val(self, runner: Runner) -> None:
        """Seed again, because a resumed run does not repeat the validation after the checkpoint."""
        if not isinstance(runner.train_loop, EpochBasedTrainLoop) and self._step == runner.iter:
            self._seed(runner, runner.iter)

    def _is_saved_now(self, runner: Runner) -> bool:
        """Whether the checkpoint hook's interval ends with this iteration."""
        return any(
            not hook.by_epoch and self.every_n_train_iters(runner, hook.interval, hook.save_begin)
            for hook in runner.hooks
            if isinstance(hook, CheckpointHook)
        )

    def _seed(self, runner: Runner, step: int) -> None:
        set_random_seed(_mix(runner.seed, step))
        self._step = step


class _SeededBatch(list):
    """Indices of a batch, with the seed for loading it."""

    seed: int


class _SeededBatches:
    """A batch sampler that gives each batch a seed that depends on its number.

    Args:
        batch_sampler: The sampler to wrap. It provides all other attributes.
    """

    def __init__(self, batch_sampler: BatchSampler) -> None:
        self.batch_sampler = batch_sampler
        self.position: Tuple[int, ...] = ()
        self.number = 0

    def seek(self, seed: int, epoch: int, number: int = 0) -> None:
        """Continue with the seed of batch ``number`` of an epoch."""
        self.position, self.number = (seed, epoch, get_rank()), number

    def __iter__(self) -> Iterator[List[int]]:
        for indices in self.batch_sampler:
            batch = _SeededBatch(indices)
            batch.seed = _mix(*self.position, self.number)
            self.number += 1
            yield batch

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __getattr__(self, name: str) -> Any:
        if name == 'batch_sampler':  # does not exist yet while this object is unpickled
            raise AttributeError(name)
        return getattr(self.batch_sampler, name)


class _SeededItems:
    """DataLoader calls this for the samples of a batch, in place of ``dataset[index]`` for each.

    Args:
        dataset: The data set.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.get_items = getattr(dataset, '__getitems__', None)

    def __call__(self, batch: List[int]) -> List[Any]:
        with _random_state_kept():
            if isinstance(batch, _SeededBatch):
                random.seed(batch.seed)
                np.random.seed(batch.seed)
                torch.default_generator.manual_seed(batch.seed)  # not the generators of GPUs
            if self.get_items is not None:
                return self.get_items(list(batch))
            return [self.dataset[index] for index in batch]


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restore the training's generators afterwards. A data worker has its own, so do nothing there."""
    if get_worker_info() is not None:
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _mix(*numbers: int) -> int:
    """Make one seed of several numbers. With sums, neighbours would share random numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) >> 1


def _set_sampler_seed(runner: Runner, dataloader: DataLoader) -> None:
    """Shuffle with the seed of the first run. Resuming restores it too late for the sampler."""
    if runner._randomness_cfg.get('diff_rank_seed'):
        return  # the runner's seed belongs to this rank only, but all ranks must shuffle alike
    sampler = getattr(dataloader.batch_sampler, 'sampler', dataloader.sampler)
    if getattr(sampler, 'seed', None) is not None:
        sampler.seed = runner.seed

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import random
from typing import Any, Iterator, List, Optional, Tuple

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import BatchSampler, Dataset, IterableDataset

from mmlinglo.registry import HOOKS


@HOOKS.register_module()
class ReseedHook(Hook):
    """Make a resumed training equal to an uninterrupted one.

    mmengine's checkpoints hold the weights, optimizer, schedulers, counters and seed, but no
    state of a random generator. So drop path and augmentations of a resumed run start over with
    the random numbers of the first epoch. Without a seed in the config, a new seed shuffles the
    data. This hook makes the random numbers depend only on the seed and on the position in the
    training. It seeds Python, numpy and torch

    - in the training process, at each iteration, by the number of the iteration;
    - where data are loaded, at each batch, by the number of the batch. The number of data workers
      does not matter, nor that they survive all epochs with ``persistent_workers``.

    The hook reproduces the weights, the loss curve, and the order and augmentation of the data.
    They are equal bit by bit where the operations are deterministic (float32 on the CPU is). It
    does not matter whether you set ``randomness.seed`` or mmengine drew it. Resume with the same
    config and number of processes.

    The hook does not reproduce:

    - A run resumed from a checkpoint in the middle of an epoch: mmengine starts that epoch over.
    - Data of an ``IterableDataset``, and of loaders without batches (``batch_size=None``).
    - An interrupted validation: mmengine continues after it. ``SafeCheckpointHook`` repeats it.
    - GPU kernels that are not deterministic (see ``randomness.deterministic``).
    """

    priority = 'LOWEST'  # after mmengine's DistSamplerSeedHook, and after hooks that draw numbers

    def __init__(self) -> None:
        self._batches: Optional[_NumberedBatches] = None

    def before_train(self, runner: Runner) -> None:
        """Make the data loader use a seed for each batch."""
        loader = runner.train_loop.dataloader
        if loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset):
            return
        # Resuming restores the seed too late for the sampler. With diff_rank_seed, the runner's
        # seed belongs to this rank only, but all ranks must shuffle alike.
        sampler = getattr(loader.batch_sampler, 'sampler', loader.sampler)
        if getattr(sampler, 'seed', None) is not None:
            if not runner._randomness_cfg.get('diff_rank_seed'):
                sampler.seed = runner.seed
        self._batches = _NumberedBatches(loader.batch_sampler)
        # DataLoader refuses to set this attribute
        vars(loader)['batch_sampler'] = self._batches
        loader.dataset.__getitems__ = _SeededItems(loader.dataset)
        loader._iterator = None  # workers that were started before

    def before_train_epoch(self, runner: Runner) -> None:
        """Number the batches from the start of an epoch, or of an iteration-based run."""
        _seed(runner.seed, runner.iter)
        loop = runner.train_loop
        if self._batches is None:
            return
        if isinstance(loop, EpochBasedTrainLoop):
            self._batches.seek(runner.seed, runner.epoch)
            return
        iterator = loop.dataloader_iterator
        # Otherwise mmengine loads and drops all batches up to this one, which counts them.
        skips = hasattr(iterator, 'skip_iter') and hasattr(loop.dataloader.sampler, 'skip')
        self._batches.seek(runner.seed, 0, runner.iter if skips else 0)
        if iterator._iterator is not None:  # the original mmengine has already started to load
            sampler = loop.dataloader.sampler
            if hasattr(sampler, '_indices_of_rank'):
                sampler.indices = sampler._indices_of_rank()
            iterator._iterator = iter(loop.dataloader)

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Optional[dict] = None
    ) -> None:
        """Seed the training process."""
        _seed(runner.seed, runner.iter)


class _NumberedBatch(list):
    """Indices of a batch, and its position in the training: seed, epoch, rank, number."""

    position: Tuple[int, ...]


class _NumberedBatches:
    """A batch sampler that gives each batch its position in the training.

    Args:
        batch_sampler: The sampler to wrap. It provides all other attributes.
    """

    def __init__(self, batch_sampler: BatchSampler) -> None:
        self.batch_sampler = batch_sampler
        self.position: Tuple[int, ...] = ()
        self.number = 0

    def seek(self, seed: int, epoch: int, number: int = 0) -> None:
        """Continue with batch ``number`` of an epoch."""
        self.position, self.number = (seed, epoch, get_rank()), number

    def __iter__(self) -> Iterator[List[int]]:
        for indices in self.batch_sampler:
            batch = _NumberedBatch(indices)
            batch.position = (*self.position, self.number)
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
        if isinstance(batch, _NumberedBatch):
            _seed(*batch.position)
        if self.get_items is not None:
            return self.get_items(list(batch))
        return [self.dataset[index] for index in batch]


def _seed(*position: int) -> None:
    """Seed all generators. With sums of the numbers, neighbours would share random numbers."""
    seed = int(np.random.SeedSequence(position).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    # torch.manual_seed takes ten times as long, for devices that are not in use
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)

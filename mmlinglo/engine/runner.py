# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import copy
import logging
from fractions import Fraction
from typing import Any, Dict, List, Optional, Union

from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import OPTIMIZERS
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, Runner
from mmengine.runner.checkpoint import CheckpointLoader

from mmlinglo.checkpoint import NOT_RESUMABLE, CheckpointError, check_fit, find_state_dict

from .errors import TrainingError
from .launch import hide_native_output

WARM_UPS = ('LinearLR', 'ConstantLR', 'QuadraticWarmupLR')
PERIODS = ('T_max', 'step_size', 'periods', 'total_steps')


class QuietRunner(Runner):
    """mmengine's Runner, without the shell's complaint if the C compiler that it looks for is missing."""

    def _log_env(self, env_cfg: dict) -> None:
        with hide_native_output(2):
            super()._log_env(env_cfg)


class TrainingRunner(QuietRunner):
    """The Runner with strict resuming and schedules that fit short trainings.

    - It refuses to resume from a checkpoint of another model, or of an optimizer with other
      parameter groups.
    - If a training is shorter than its learning rate schedule, it shortens the schedule: see
      :func:`fit_schedulers`.
    - ``auto_scale_lr`` counts the batches of ``accumulative_counts`` as one batch.
    """

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """Resume a training.

        Raises:
            CheckpointError: If the checkpoint is of another training, or has only weights, as the
                best ones have.
        """
        checkpoint = CheckpointLoader.load_checkpoint(filename, map_location='cpu')
        model = self.model.module if is_model_wrapper(self.model) else self.model
        try:
            check_fit(find_state_dict(checkpoint), model.state_dict(), filename)
            self._check_state(checkpoint, filename)
            super().resume(filename, *args, **kwargs)
        except (CheckpointError, ValueError) as error:  # torch's, if the parameter groups differ
            raise CheckpointError(f'{error}. {NOT_RESUMABLE.format(source=filename)}') from error

    def _check_state(self, checkpoint: dict, filename: str) -> None:
        """Refuse checkpoints without the state of the training; warn if the schedule is another."""
        needed = [
            'meta',
            'message_hub',
            'optimizer',
            *['param_schedulers'] * bool(self.param_schedulers),
        ]
        missing = [key for key in needed if key not in checkpoint]
        if missing:
            raise CheckpointError(
                f'{filename!r} has no {", ".join(missing)}, as best ones have not'
            )
        own, saved = map(_list_lengths, (self.param_schedulers, checkpoint.get('param_schedulers')))
        if own != saved:
            self.logger.warning(
                f'the learning rate continues as for the training that was interrupted, which had '
                f'the lengths {saved}; this one would have {own}'
            )

    def build_train_loop(self, loop: Union[BaseLoop, dict]) -> BaseLoop:
        """Build the loop.

        Raises:
            TrainingError: If there are fewer samples than a batch has, and ``drop_last=True``.
        """
        loop = super().build_train_loop(loop)
        loader = loop.dataloader
        if len(loader) == 0:
            raise TrainingError(
                f'train_dataloader has no batch: {len(loader.dataset)} samples, batch_size='
                f'{loader.batch_sampler.batch_size}, drop_last=True. Choose a smaller batch_size'
            )
        return loop

    def build_optim_wrapper(self, optim_wrapper: Union[dict, OptimWrapper]) -> OptimWrapper:
        """Build the optimizer.

        Raises:
            TrainingError: If there is none of its name.
        """
        optimizer = optim_wrapper.get('optimizer') if isinstance(optim_wrapper, dict) else None
        name = optimizer.get('type') if isinstance(optimizer, dict) else None
        if isinstance(name, str) and OPTIMIZERS.get(name) is None:
            raise TrainingError(
                f'no optimizer is called {name!r}: correct optim_wrapper.optimizer.type'
            )
        return super().build_optim_wrapper(optim_wrapper)

    def build_param_scheduler(self, scheduler: Union[dict, list]) -> Union[dict, list]:
        """Build the schedulers, fitted to the length of the training."""
        configs = [scheduler] if isinstance(scheduler, dict) and 'type' in scheduler else scheduler
        if isinstance(configs, list) and all(isinstance(each, dict) for each in configs):
            lengths = {False: self.max_iters}
            if isinstance(self.train_loop, EpochBasedTrainLoop):
                lengths[True] = self.max_epochs
            scheduler = fit_schedulers(configs, lengths)
        return super().build_param_scheduler(scheduler)

    def scale_lr(self, optim_wrapper: OptimWrapper, auto_scale_lr: Optional[dict] = None) -> None:
        """Scale the learning rate by the batch size of an optimizer step.

        Raises:
            ValueError: If several optimizers accumulate different numbers of batches.
        """
        if auto_scale_lr is not None and auto_scale_lr.get('enable', False):
            counts = {each._accumulative_counts for each in optim_wrappers(optim_wrapper)}
            if len(counts) > 1:
                raise ValueError(
                    f'auto_scale_lr needs the same accumulative_counts of all optimizers, got {counts}'
                )
            (count,) = counts
            if count > 1:
                base = auto_scale_lr['base_batch_size']
                auto_scale_lr = dict(auto_scale_lr, base_batch_size=base / count)
                self.logger.info(
                    f'{count} batches are accumulated for a step: the base batch size of {base} '
                    f'is {base / count:g} for each'
                )
        super().scale_lr(optim_wrapper, auto_scale_lr)


def fit_schedulers(schedulers: List[dict], lengths: Dict[bool, int]) -> List[dict]:
    """Fit parameter schedulers to a training that is shorter than they are.

    A warm-up that would not end before the training does gets a tenth of the training. Schedulers
    that would end later end with the training, and their milestones and periods shrink in
    proportion. Schedulers that would begin after the training are left out. The log gets a warning
    for each change. If the training is long enough, nothing changes.

    Args:
        schedulers: Configs of the schedulers. They are not changed.
        lengths: Length of the training in epochs (key True) and in iterations (key False). If the
            length in a scheduler's unit is missing, the scheduler stays as it is.

    Returns:
        The configs to build.
    """
    schedulers = copy.deepcopy(schedulers)
    for scheduler in schedulers:
        length = lengths.get(scheduler.get('by_epoch', True))
        begin, end = scheduler.get('begin', 0), scheduler.get('end')
        if length is None or end is None or end < length or not _is_warm_up(scheduler):
            continue
        shorter = max(1, length // 10)
        for other in schedulers:
            if other.get('begin') == end and other.get('by_epoch', True) is scheduler.get(
                'by_epoch', True
            ):
                other['begin'] = shorter
        scheduler['end'] = shorter
        _warn(scheduler, length, f'warms up until {shorter} instead of {end}')

    kept = []
    for scheduler in schedulers:
        length = lengths.get(scheduler.get('by_epoch', True))
        begin, end = scheduler.get('begin', 0), scheduler.get('end')
        if length is not None and begin >= length:
            _warn(scheduler, length, f'would begin at {begin} and is left out')
            continue
        if length is not None and end is not None and end > length:
            scheduler['end'] = length
            for key in PERIODS:
                if scheduler.get(key):
                    share = Fraction(length - begin, end - begin)
                    scheduler[key] = _shorten(scheduler[key], share)
            if 'milestones' in scheduler:
                scaled = {max(1, each * length // end) for each in scheduler['milestones']}
                scheduler['milestones'] = sorted(each for each in scaled if each < length)
            what = ', '.join(
                f'{key} {scheduler[key]}' for key in (*PERIODS, 'milestones') if key in scheduler
            )
            _warn(
                scheduler, length, f'ends at {length} instead of {end}' + f' ({what})' * bool(what)
            )
        kept.append(scheduler)
    return kept


def _list_lengths(schedulers: Union[dict, list, None]) -> List[dict]:
    """What depends on the length of a training, of schedulers or of their states."""
    groups = schedulers.values() if isinstance(schedulers, dict) else [schedulers or []]
    states = [s if isinstance(s, dict) else s.state_dict() for group in groups for s in group]
    keys = ('begin', 'end', 'milestones', *PERIODS)
    return [{key: state[key] for key in keys if key in state} for state in states]


def _is_warm_up(scheduler: dict) -> bool:
    kind = scheduler['type']
    name = kind.split('.')[-1] if isinstance(kind, str) else kind.__name__
    rises = scheduler.get('start_factor', 1 / 3) < scheduler.get('end_factor', 1.0)
    return name in WARM_UPS and scheduler.get('begin', 0) == 0 and rises


def _shorten(steps: Any, share: Fraction) -> Any:
    if isinstance(steps, (list, tuple)):
        return [_shorten(each, share) for each in steps]
    return max(1, int(steps * share))


def _warn(scheduler: dict, length: int, what: str) -> None:
    unit = 'epochs' if scheduler.get('by_epoch', True) else 'iterations'
    kind = scheduler['type']
    name = kind if isinstance(kind, str) else kind.__name__
    print_log(f'this training has only {length} {unit}: {name} {what}', 'current', logging.WARNING)


def optim_wrappers(optim_wrapper: OptimWrapper) -> List[OptimWrapper]:
    """List the wrapped optimizers, of which an ``OptimWrapperDict`` has several."""
    if isinstance(optim_wrapper, OptimWrapperDict):
        return list(optim_wrapper.values())
    return [optim_wrapper]

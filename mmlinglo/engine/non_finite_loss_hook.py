# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from math import inf
from pathlib import Path
from typing import Iterator, List, Optional

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from mmlinglo.registry import HOOKS

from .errors import TrainingError
from .runner import optim_wrappers

NEVER = torch.iinfo(torch.int64).max


@HOOKS.register_module()
class NonFiniteLossHook(Hook):
    """Stop a training whose loss is NaN or infinite, or skip such steps. Never save such weights.

    ``action='stop'`` ends the training. The hook records every loss. To read the record, it must
    wait for the GPU, so it does this only every ``interval`` iterations and before each
    checkpoint. On the CPU, it does this in every iteration.

    ``action='skip'`` skips an optimizer step if its gradients are not finite, including momentum
    and weight decay. Buffers that became non-finite, such as batch-norm statistics, get their
    earlier values back. Gradients are the same on all ranks, so all ranks skip the same steps.
    With gradient accumulation, one such loss spoils the whole accumulated step. This action waits
    for the GPU in every iteration. With mixed precision, torch's gradient scaler skips such steps
    anyway. The hook does not count those whose loss is finite.

    With either action, the hook refuses to save a checkpoint, also the best one, whose parameters
    are not finite or whose buffers hold NaN.

    Args:
        action: ``'stop'`` or ``'skip'``.
        interval: Iterations between the checks of ``action='stop'`` on a GPU.
        max_skips: ``action='skip'`` ends the training after more than this number of skipped
            steps in a row.

    Raises:
        ValueError: If ``action`` is another word.
        TrainingError: While training. The message names the iteration, the learning rate and the
            last checkpoint.
    """

    priority = 'ABOVE_NORMAL'  # before AverageBuffersHook spreads and CheckpointHook saves

    def __init__(self, action: str = 'stop', interval: int = 50, max_skips: int = 10) -> None:
        if action not in ('stop', 'skip'):
            raise ValueError(f"action must be 'stop' or 'skip', got {action!r}")
        self.action = action
        self.interval = interval
        self.max_skips = max_skips
        self._first: Optional[Tensor] = None  # iteration of the first non-finite loss
        self._skips = 0  # in a row
        self._step_left_out = False
        self._step_made = False
        self._buffers: List[Tensor] = []  # as before the iteration

    def before_train(self, runner: Runner) -> None:
        """For ``action='skip'``, watch the optimizer's steps."""
        if self.action == 'skip':
            for wrapper in optim_wrappers(runner.optim_wrapper):
                wrapper.optimizer.register_step_pre_hook(self._leave_out_non_finite)

    def before_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Optional[dict] = None,
    ) -> None:
        """Remember the buffers."""
        if self.action == 'skip':
            self._buffers = [buffer.clone() for buffer in _float_buffers(runner)]

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Optional[dict] = None,
        outputs: Optional[dict] = None,
    ) -> None:
        """Look at the loss."""
        loss = outputs.get('loss') if isinstance(outputs, dict) else None
        if outputs is None or not isinstance(loss, Tensor):
            return
        if self.action == 'skip':
            self._after_step(runner, outputs)
            return
        first = loss.new_full((), NEVER, dtype=torch.int64) if self._first is None else self._first
        self._first = torch.where(loss.isfinite().all(), first, first.clamp(max=runner.iter + 1))
        if loss.device.type == 'cpu' or self.every_n_train_iters(runner, self.interval):
            self._check(runner, outputs)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Refuse to save weights that are not finite."""
        self._check(runner)
        parameters = {name for name, _ in runner.model.named_parameters()}
        parameters |= {name[len('module.') :] for name in parameters if name.startswith('module.')}
        for name, value in checkpoint['state_dict'].items():
            if not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            # some models have buffers that are infinite on purpose, such as attention masks
            wrong = ~value.isfinite() if name in parameters else value.isnan()
            if wrong.any():
                raise TrainingError(
                    f'{name} is not finite {_where(runner, runner.iter)}; it was not saved'
                )

    def _check(self, runner: Runner, outputs: Optional[dict] = None) -> None:
        if self._first is not None and int(self._first) != NEVER:
            raise TrainingError(
                f'{_describe(outputs, "the loss was not finite")} {_where(runner, int(self._first))}. Lower the learning rate, '
                'clip gradients (optim_wrapper.clip_grad), look at the data '
                '(tools/misc/check_dataset.py), or skip such steps (--cfg-options '
                'default_hooks.non_finite.action=skip)'
            )

    def _leave_out_non_finite(self, optimizer: Optimizer, *_: object) -> None:
        """Before a step, drop the gradients if they are not finite, so that the step changes nothing."""
        groups = optimizer.param_groups
        parameters = [p for group in groups for p in group['params'] if p.grad is not None]
        # computes the norm of all gradients; without a limit, it clips nothing
        if clip_grad_norm_(parameters, max_norm=inf).isfinite():
            self._skips = 0
            self._step_made = True
        else:
            optimizer.zero_grad(set_to_none=True)
            self._step_left_out = True

    def _after_step(self, runner: Runner, outputs: dict) -> None:
        left_out, self._step_left_out = self._step_left_out, False
        made, self._step_made = self._step_made, False
        # torch's gradient scaler skips a step by itself, before the optimizer sees it
        if not left_out and outputs['loss'].isfinite().all():
            return
        for buffer, before in zip(_float_buffers(runner), self._buffers):
            buffer.copy_(torch.where(buffer.isfinite(), buffer, before))
        message = (
            f'{_describe(outputs, "a gradient is not finite")} {_where(runner, runner.iter + 1)}'
        )
        if made and not left_out:
            runner.logger.warning(f'{message}: the step is made, since its gradients are finite')
            return
        self._skips += 1
        if self._skips > self.max_skips:
            raise TrainingError(f'{message}: more than {self.max_skips} such steps in a row')
        runner.logger.warning(f'{message}: this step is skipped')


def _float_buffers(runner: Runner) -> Iterator[Tensor]:
    return (buffer for buffer in runner.model.buffers() if buffer.is_floating_point())


def _describe(outputs: Optional[dict], otherwise: str) -> str:
    """Name the losses that are not finite, if they are known."""
    losses = {k: v for k, v in (outputs or {}).items() if isinstance(v, Tensor)}
    wrong = [f'{k} is {v.item()}' for k, v in losses.items() if v.numel() == 1 and not v.isfinite()]
    return ', '.join(wrong) or otherwise


def _where(runner: Runner, iteration: int) -> str:
    """Name the iteration, the learning rate and the last checkpoint."""
    rates = ', '.join(f'{name} {v[0]:.3g}' for name, v in runner.optim_wrapper.get_lr().items())
    pointer = Path(runner.work_dir, 'last_checkpoint')
    last = pointer.read_text() if pointer.is_file() else 'none'
    return f'at iteration {iteration} on rank {get_rank()} ({rates}; last checkpoint: {last})'

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import sys
from pathlib import Path
from typing import Any, Optional

import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import Progress

from mmlinglo.registry import HOOKS


@HOOKS.register_module()
class ProgressHook(Hook):
    """Log what runs on which device, and where its files are, and draw a progress bar for evaluations.

    The bar appears only in terminals, on standard error.
    """

    priority = 'VERY_LOW'
    bar: Optional[Progress] = None

    def before_train(self, runner: Runner) -> None:
        """Log the model, where it is trained, and the numbers of images."""
        counts = [f'{len(runner.train_dataloader.dataset)} images for training']
        if runner.val_loop is not None:
            counts.append(f'{len(runner.val_dataloader.dataset)} for validation')
        runner.logger.info(f'{describe(runner)}: {", ".join(counts)}')

    def after_train(self, runner: Runner) -> None:
        """Log the paths of what the training wrote."""
        runner.logger.info(
            f'checkpoints in {runner.work_dir}, log in {Path(runner.log_dir).name}/ there'
        )

    def before_test(self, runner: Runner) -> None:
        """Log the model, where it runs, and the number of images."""
        number = len(runner.test_dataloader.dataset)
        runner.logger.info(f'{describe(runner)}: {number} images to test')

    def _before_epoch(self, runner: Runner, mode: str = 'train') -> None:
        if mode != 'train' and is_main_process() and sys.stderr.isatty():
            loader = runner.val_dataloader if mode == 'val' else runner.test_dataloader
            self.bar = Progress(console=Console(stderr=True), transient=True)
            self.bar.add_task('validation' if mode == 'val' else 'test', total=len(loader))
            self.bar.start()

    def _after_iter(self, *_: Any, **__: Any) -> None:
        if self.bar is not None:
            self.bar.advance(self.bar.task_ids[0])

    def _after_epoch(self, *_: Any, **__: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def describe(runner: Runner) -> str:
    """Describe the model, its number of parameters, and where it runs."""
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    backbone = getattr(model, 'backbone', None)
    name = type(model).__name__
    if backbone is not None:
        name += f' with {type(backbone).__name__}'
    if torch.cuda.is_available():
        where = f'{get_world_size()} x {torch.cuda.get_device_name()}'
    else:
        count = get_world_size()
        where = f'the CPU in {count} process{"es" if count > 1 else ""}'
    return f'{name}, {parameters / 1e6:.1f} M parameters, on {where}'

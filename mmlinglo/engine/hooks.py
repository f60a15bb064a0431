# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from pathlib import Path
from typing import Dict, Optional

from mmengine.dist import all_reduce_params, is_main_process
from mmengine.fileio import dump
from mmengine.hooks import Hook, LoggerHook
from mmengine.runner import Runner

from mmlinglo.registry import HOOKS
from mmlinglo.utils.files import complete_file


@HOOKS.register_module()
class AverageBuffersHook(Hook):
    """Average floating-point buffers, such as batch-norm statistics, over the processes.

    Use it for processes without GPUs, where torch's SyncBatchNorm does not work. Unlike
    mmengine's ``SyncBuffersHook``, it averages after every training iteration. Only rank 0
    writes checkpoints, so this gives the checkpoints of an iteration-based schedule the
    statistics of all ranks. The buffers of LinGlo-b0 have 0.5 MB, a thirtieth of its gradients.
    """

    priority = 'NORMAL'  # before the checkpoint hook

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Optional[dict] = None,
        outputs: Optional[dict] = None,
    ) -> None:
        """Average the buffers."""
        buffers = [b for b in runner.model.buffers() if b.is_floating_point()]
        all_reduce_params(buffers, op='mean')


@HOOKS.register_module()
class MainProcessLoggerHook(LoggerHook):
    """mmengine's ``LoggerHook``, but only the main process writes files, and it writes them completely.

    In mmengine's hook, all processes write the metrics of a test and copy the logs to ``out_dir``
    at once. This can leave an invalid JSON file.
    """

    def after_test_epoch(self, runner: Runner, metrics: Optional[Dict[str, float]] = None) -> None:
        """Log the metrics, and write them to a file in the main process."""
        tag, text = runner.log_processor.get_log_after_epoch(
            runner, len(runner.test_dataloader), 'test', with_non_scalar=True
        )
        runner.logger.info(text)
        if is_main_process():
            with complete_file(Path(runner.log_dir, self.json_log_path)) as file:
                dump(self._process_tags(tag), str(file))

    def after_run(self, runner: Runner) -> None:
        """Close the visualizer, and copy the logs in the main process."""
        if is_main_process():
            super().after_run(runner)
        else:
            runner.visualizer.close()

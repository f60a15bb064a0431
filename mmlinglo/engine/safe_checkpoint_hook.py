# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import errno
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Dict, List, Optional, Union

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.fileio import LocalBackend, get_file_backend, register_backend
from mmengine.hooks import CheckpointHook, EarlyStoppingHook
from mmengine.runner import EpochBasedTrainLoop, Runner

from mmlinglo.registry import HOOKS

from .errors import TrainingError

BACKEND = 'mmlinglo.whole_files'
PARTIAL = '.partial'  # ends the name of a file that is being written
# Keys in a checkpoint.
OUTDATED = 'outdated_checkpoints'
STOPPING = 'early_stopping'
VALIDATED = 'validated'  # saved again after its validation, which was the best so far


@register_backend(BACKEND)
class WholeFileBackend(LocalBackend):
    """Local files that are complete or absent, whenever the process or the machine stops."""

    def put(self, obj: bytes, filepath: Union[str, Path]) -> None:
        """Write a file beside ``filepath``, flush it to the disk, and only then rename it.

        Raises:
            TrainingError: If the disk or the quota is full. ``filepath`` is as it was before, and
                the unfinished file is removed.
        """
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(f'{path}{PARTIAL}')
        try:
            with open(partial, 'wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            free = shutil.disk_usage(path.parent).free
            raise TrainingError(
                f'{path.name} needs {_megabytes(len(obj))}, but {path.parent} has only '
                f'{_megabytes(free)} free ({error.strerror}); earlier checkpoints are complete'
            ) from error
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # stores the new name too
        finally:
            os.close(folder)


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, but there is always a complete checkpoint on the disk.

    mmengine removes the outdated checkpoint before it writes the new one, and writes the new one
    under its final name. If the process is killed in between, half a checkpoint remains. With
    ``max_keep_ckpts=1`` nothing else remains, and ``resume`` fails. This hook

    - writes to ``NAME.partial``, and renames the file when it is on the disk,
    - removes an outdated checkpoint, also a best one, only after ``last_checkpoint`` names the new
      one, so the disk needs room for one more checkpoint,
    - resumes (``resume=True``, ``load_from=None``) from the newest complete checkpoint if
      ``last_checkpoint`` names none; rank 0 chooses for all ranks,
    - removes at the next start what a killed run left behind: ``*.partial``, and files that the
      run was about to remove,
    - repeats the validation of the resumed checkpoint, because the run may have been killed in
      it. Otherwise, its score would stay unknown, and another checkpoint could become the best,
    - saves and restores the state of ``EarlyStoppingHook``.

    The arguments, the file names and the content of the checkpoints are mmengine's. The hook adds
    only ``outdated_checkpoints``, ``early_stopping`` and ``validated``. It leaves the writing to mmengine for a
    remote ``out_dir``, with ``backend_args``, and for the directories that DeepSpeed writes.

    Raises:
        TrainingError: While saving, if the disk is full. The message names the needed and the free
            space. Before training, if ``last_checkpoint`` names a missing file and there is no
            complete checkpoint beside it.
    """

    def before_run(self, runner: Runner) -> None:
        """Choose the checkpoint to resume from."""
        self._outdated: List[str] = []
        self._is_validated = False
        # private attributes, but the same in all releases; the runner reads them after this hook
        if runner._resume and runner._load_from is None and self._is_local(runner):
            found = [self._find_whole(runner) if is_main_process() else None]
            broadcast_object_list(found)
            runner._load_from = found[0]
            runner._resume = found[0] is not None
            if not runner._resume:
                runner.logger.info(f'No checkpoint in {runner.work_dir} yet: starting anew.')

    def before_train(self, runner: Runner) -> None:
        """From now on, write complete files. Finish what a killed run left undone."""
        if self._is_local(runner):
            self.backend_args = dict(backend=BACKEND)
        super().before_train(runner)
        if self.backend_args == dict(backend=BACKEND):
            self._remove_outdated(runner)
            for partial in Path(self.out_dir).glob(f'*{PARTIAL}') if is_main_process() else ():
                runner.logger.info(f'Removing {partial}, which a killed run left behind.')
                partial.unlink(missing_ok=True)
            # mmengine removes before it saves
            self.file_backend.remove = self._outdated.append
        if runner.iter > 0 and self._is_validated_here(runner):
            runner.logger.info('Repeating the validation of the resumed checkpoint.')
            schedulers = runner.param_schedulers
            if self._is_validated:
                runner.param_schedulers = None  # they have seen the score
            runner.val_loop.run()
            runner.param_schedulers = schedulers
        self._is_validated = False

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add what a resumed run has to remove, and the state of early stopping."""
        checkpoint[OUTDATED] = list(self._outdated)
        checkpoint[VALIDATED] = self._is_validated
        checkpoint[STOPPING] = [
            dict(wait_count=hook.wait_count, best_score=hook.best_score)
            for hook in _early_stopping_hooks(runner)
        ]

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Restore both, if the run is resumed."""
        if runner._resume:
            self._outdated = list(checkpoint.get(OUTDATED, []))
            self._is_validated = checkpoint.get(VALIDATED, False)
            for hook, state in zip(_early_stopping_hooks(runner), checkpoint.get(STOPPING, [])):
                vars(hook).update(state)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        super()._save_checkpoint_with_step(runner, step, meta)
        self._remove_outdated(runner)

    def _save_best_checkpoint(self, runner: Runner, metrics: Dict[str, float]) -> None:
        self._is_validated = True
        super()._save_best_checkpoint(runner, metrics)
        self._is_validated = False
        self._remove_outdated(runner)

    def _remove_outdated(self, runner: Runner) -> None:
        """Remove what mmengine wanted to remove before it saved the last checkpoint."""
        info = runner.message_hub.runtime_info
        best = [Path(value) for key, value in info.items() if key.startswith('best_ckpt')]
        for path in map(Path, self._outdated if is_main_process() else ()):
            # nothing in another work dir, from which this run was resumed
            if path.parent == Path(self.out_dir) and path not in best:
                path.unlink(missing_ok=True)
        self._outdated.clear()

    def _is_local(self, runner: Runner) -> bool:
        """Whether the config asks for local files only."""
        if self.backend_args is not None or self.file_client_args is not None:
            return False
        return type(get_file_backend(self.out_dir or runner.work_dir)) is LocalBackend

    def _is_validated_here(self, runner: Runner) -> bool:
        """Whether a validation follows the resumed epoch or iteration."""
        loop = runner.train_loop
        by_epoch = isinstance(loop, EpochBasedTrainLoop)
        if runner.val_loop is None or by_epoch != self.by_epoch:
            return False
        loop._decide_current_val_interval()
        now, last = (loop.epoch, loop.max_epochs) if by_epoch else (loop.iter, loop.max_iters)
        return now >= loop.val_begin and (now % loop.val_interval == 0 or now == last)

    def _find_whole(self, runner: Runner) -> Optional[str]:
        """Find the newest complete checkpoint: that of ``last_checkpoint``, unless it is missing or older.

        Raises:
            TrainingError: If ``last_checkpoint`` names a missing or broken file, and no other
                checkpoint is complete.
        """
        folder = Path(runner.work_dir)
        pointer = folder / 'last_checkpoint'
        text = pointer.read_text().strip() if pointer.is_file() else ''
        if self.out_dir is not None and Path(self.out_dir) != folder:
            folder = Path(self.out_dir, folder.name)
        # torch.save writes a zip archive, which has its table of contents at its end
        whole = [p for p in folder.glob('*') if self._step(p) >= 0 and zipfile.is_zipfile(p)]
        whole.sort(key=lambda p: (p.stat().st_mtime, self._step(p)))
        named = Path(text)
        if text and (zipfile.is_zipfile(named) or named.is_dir()):  # DeepSpeed writes directories
            step, time = self._step(named), named.stat().st_mtime
            # for runs killed before last_checkpoint was written; an older run may have a higher step
            later = [p for p in whole if self._step(p) > step and p.stat().st_mtime > time]
            return str([named, *later][-1])
        if text:
            broken = f'{pointer} names {named}, which is not a complete checkpoint'
            if not whole:
                raise TrainingError(
                    f'{broken}, and {folder} has no other one: restore it, or remove {pointer} to '
                    'start from the beginning'
                )
            runner.logger.warning(f'{broken}: resuming from {whole[-1]}, the newest complete one')
        return str(whole[-1]) if whole else None

    def _step(self, path: Path) -> int:
        """Read the epoch or iteration from the name of a regular checkpoint. -1 for other names."""
        before, after = (re.escape(part) for part in self.filename_tmpl.split('{}'))
        match = re.fullmatch(rf'{before}(\d+){after}', path.name)
        return int(match.group(1)) if match else -1


def _early_stopping_hooks(runner: Runner) -> List[EarlyStoppingHook]:
    return [hook for hook in runner.hooks if isinstance(hook, EarlyStoppingHook)]


def _megabytes(size: int) -> str:
    return f'{size / 1e6:.1f} MB'

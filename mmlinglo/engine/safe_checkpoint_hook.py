# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import errno
import os
import os.path as osp
import re
import shutil
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.fileio import LocalBackend, get_file_backend, register_backend
from mmengine.hooks import CheckpointHook, EarlyStoppingHook
from mmengine.runner import EpochBasedTrainLoop, Runner

from mmlinglo.registry import HOOKS

from .errors import TrainingError

BACKEND = 'mmlinglo.whole_files'
PARTIAL = '.partial'  # ends the name of a file that is being written
REPLACED = 'replaced_best_ckpts'  # key for the best checkpoints before the last validation
HOOK_STATES = 'hook_states'  # key in a checkpoint
LAST = 'last_checkpoint'  # mmengine's file with the name of the latest checkpoint


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
    - then updates ``last_checkpoint`` in the same way, and only then removes the outdated
      checkpoint, so the disk needs room for one more checkpoint,
    - saves a new best checkpoint before it removes the earlier one,
    - resumes (``resume=True``, ``load_from=None``) from the newest complete checkpoint if
      ``last_checkpoint`` names none; rank 0 chooses for all ranks,
    - removes at the next start what a killed run left behind: ``*.partial``, and files that the
      run was about to remove,
    - repeats the validation of the resumed checkpoint, because the run may have been killed in
      it. Otherwise, its score would stay unknown, and another checkpoint could become the best.
      The hook does this only if something uses the score: ``save_best``, ``EarlyStoppingHook`` or
      a scheduler that follows a metric,
    - saves and restores the state of ``EarlyStoppingHook``, and of every hook that has the methods
      ``state_dict()`` and ``load_state_dict(state)``, under the name of its class.

    The arguments, the file names and the content of the checkpoints are mmengine's. The hook adds
    only ``hook_states``. It leaves the writing to mmengine for a remote ``out_dir``, with
    ``backend_args``, and for the directories that DeepSpeed writes.

    Raises:
        TrainingError: While saving, if the disk is full. The message names the needed and the free
            space. Before training, if ``last_checkpoint`` names a missing file and there is no
            complete checkpoint beside it.
    """

    def before_run(self, runner: Runner) -> None:
        """Choose the checkpoint to resume from."""
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
        if self.backend_args == dict(backend=BACKEND) and is_main_process():
            for partial in Path(self.out_dir).glob(f'*{PARTIAL}'):
                runner.logger.info(f'Removing {partial}, which a killed run left behind.')
                partial.unlink(missing_ok=True)
        if self.save_best is not None and is_main_process():
            replaced = runner.message_hub.runtime_info.get(REPLACED, [])
            for path in set(replaced) - set(self._best_paths().values()):
                self._remove(path)
        if runner.iter > 0 and self._uses_scores(runner) and self._is_validated_here(runner):
            runner.logger.info('Repeating the validation of the resumed checkpoint.')
            runner.val_loop.run()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the states of the hooks."""
        states = {name: hook.state_dict() for name, hook in _stateful_hooks(runner)}
        if states:
            checkpoint[HOOK_STATES] = states

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Restore the states of the hooks, if the run is resumed."""
        if runner._resume:
            states = checkpoint.get(HOOK_STATES, {})
            for name, hook in _stateful_hooks(runner):
                if name in states:
                    hook.load_state_dict(states[name])

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        """Save, then name the checkpoint in ``last_checkpoint``, then remove the outdated one."""
        outdated = []
        if self.max_keep_ckpts > 0 and list(self.keep_ckpt_ids)[-1:] != [step]:
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                outdated.append(self.keep_ckpt_ids.popleft())
            self.keep_ckpt_ids.append(step)
            # if the next lines do not run, mmengine removes the surplus one when it resumes
            runner.message_hub.update_info('keep_ckpt_ids', [*outdated, *self.keep_ckpt_ids])

        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            WholeFileBackend().put(self.last_ckpt.encode(), osp.join(runner.work_dir, LAST))
            for old in outdated:
                self._remove(
                    self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(old))
                )

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        """Save the best checkpoint, then remove the one before."""
        if not self.save_best:
            return
        before = self._best_paths()
        # if the run is killed before the removal below, the resumed run removes them
        runner.message_hub.update_info(REPLACED, [path for path in before.values() if path])
        # mmengine would remove these first, so it must not know them
        self._set_best_paths(dict.fromkeys(before))
        super()._save_best_checkpoint(runner, metrics)
        after = self._best_paths()
        self._set_best_paths({key: after[key] or path for key, path in before.items()})
        for key, path in before.items():
            if path and after[key] and path != after[key] and is_main_process():
                self._remove(path)

    def _best_paths(self) -> Dict[str, Optional[str]]:
        if len(self.key_indicators) == 1:
            # not under its indicator, which may be 'auto' until the first validation
            return {'': self.best_ckpt_path}
        return dict(self.best_ckpt_path_dict)

    def _set_best_paths(self, paths: Dict[str, Optional[str]]) -> None:
        if len(self.key_indicators) == 1:
            (self.best_ckpt_path,) = paths.values()
        else:
            self.best_ckpt_path_dict = paths

    def _remove(self, path: str) -> None:
        if osp.dirname(path) != str(self.out_dir).rstrip('/'):
            return  # in another work dir, from which this run was resumed
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):  # DeepSpeed's
            self.file_backend.rmtree(path)

    def _is_local(self, runner: Runner) -> bool:
        """Whether the config asks for local files only."""
        if self.backend_args is not None or self.file_client_args is not None:
            return False
        return type(get_file_backend(self.out_dir or runner.work_dir)) is LocalBackend

    def _uses_scores(self, runner: Runner) -> bool:
        """Whether anything uses the score of a validation."""
        schedulers = runner.param_schedulers or []
        if isinstance(schedulers, dict):
            schedulers = [each for several in schedulers.values() for each in several]
        return (
            self.save_best is not None
            or any(isinstance(hook, EarlyStoppingHook) for hook in runner.hooks)
            or any(getattr(each, 'need_val_args', False) for each in schedulers)
        )

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
        pointer = Path(runner.work_dir, LAST)
        text = pointer.read_text().strip() if pointer.is_file() else ''
        named = Path(text) if text else None
        if named is not None and named.is_dir():
            return text  # DeepSpeed's
        folder = Path(runner.work_dir)
        if self.out_dir is not None and Path(self.out_dir) != folder:
            folder = Path(self.out_dir, folder.name)
        others = self._whole_checkpoints(folder)
        if named is None:
            return str(others[-1]) if others else None
        if zipfile.is_zipfile(named):
            step, time = self._step(named), named.stat().st_mtime
            # for runs killed before last_checkpoint was written; an older run may have a higher step
            later = [p for p in others if self._step(p) > step and p.stat().st_mtime > time]
            return str([named, *later][-1])
        broken = f'{pointer} names {named}, which is not a complete checkpoint'
        if not others:
            raise TrainingError(
                f'{broken}, and {folder} has no other one: restore it, or remove {pointer} to start '
                'from the beginning'
            )
        runner.logger.warning(f'{broken}: resuming from {others[-1]}, the newest complete one')
        return str(others[-1])

    def _whole_checkpoints(self, folder: Path) -> List[Path]:
        """List the regular checkpoints that torch finished writing, the newest last."""
        # torch.save writes a zip archive, which has its table of contents at its end
        paths = [p for p in folder.glob('*') if self._step(p) >= 0 and zipfile.is_zipfile(p)]
        return sorted(paths, key=lambda p: (p.stat().st_mtime, self._step(p)))

    def _step(self, path: Path) -> int:
        """Read the epoch or iteration from the name of a regular checkpoint. -1 for other names."""
        before, after = (re.escape(part) for part in self.filename_tmpl.split('{}'))
        match = re.fullmatch(rf'{before}(\d+){after}', path.name)
        return int(match.group(1)) if match else -1


class _EarlyStoppingState:
    """State of mmengine's ``EarlyStoppingHook``, which has no methods for it."""

    def __init__(self, hook: EarlyStoppingHook) -> None:
        self.hook = hook

    def state_dict(self) -> dict:
        return dict(wait_count=self.hook.wait_count, best_score=self.hook.best_score)

    def load_state_dict(self, state: dict) -> None:
        self.hook.wait_count, self.hook.best_score = state['wait_count'], state['best_score']


def _stateful_hooks(runner: Runner) -> Iterator[Tuple[str, Any]]:
    """List names and owners of states. Several hooks of one class get numbers."""
    counts: Counter = Counter()
    for hook in runner.hooks:
        name = type(hook).__name__
        counts[name] += 1
        name += f'_{counts[name]}' * (counts[name] > 1)
        if isinstance(hook, EarlyStoppingHook) and not hasattr(hook, 'state_dict'):
            yield name, _EarlyStoppingState(hook)
        elif hasattr(hook, 'state_dict') and hasattr(hook, 'load_state_dict'):
            yield name, hook


def _megabytes(size: int) -> str:
    return f'{size / 1e6:.1f} MB'

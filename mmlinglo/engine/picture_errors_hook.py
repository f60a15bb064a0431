# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from typing import Any, Callable, Optional

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.data import Dataset

from mmlinglo.registry import HOOKS

from .errors import TrainingError


@HOOKS.register_module()
class PictureErrorsHook(Hook):
    """Name the image in every error of a data pipeline.

    Errors of OpenCV and of most augmentations do not say which image caused them. The hook
    reads no files and suppresses no error.

    Raises:
        TrainingError: In place of an error of the pipeline, which becomes its ``__cause__``.
    """

    def before_train(self, runner: Runner) -> None:
        """Wrap the pipeline of the training data."""
        _name_pictures(runner.train_dataloader.dataset)

    def before_val(self, runner: Runner) -> None:
        """Wrap the pipeline of the validation data."""
        _name_pictures(runner.val_dataloader.dataset)

    def before_test(self, runner: Runner) -> None:
        """Wrap the pipeline of the test data."""
        _name_pictures(runner.test_dataloader.dataset)


class NamingPipeline:
    """A data pipeline whose errors begin with the names of the sample's files.

    Args:
        pipeline: The pipeline to call. This object passes on all other attributes of it.
    """

    def __init__(self, pipeline: Callable[[dict], Optional[dict]]) -> None:
        self.pipeline = pipeline

    def __call__(self, data: dict) -> Optional[dict]:
        files = [str(data[key]) for key in ('img_path', 'seg_map_path') if data.get(key)]
        try:
            return self.pipeline(data)
        except Exception as error:
            message = ' '.join(str(error).split())  # OpenCV's has line breaks
            raise TrainingError(
                f'{" with ".join(files) or "a sample"}: {type(error).__name__}: {message}. '
                'tools/misc/check_dataset.py looks for all such files'
            ) from error

    def __getattr__(self, name: str) -> Any:
        if name == 'pipeline':  # does not exist yet while a data worker unpickles this object
            raise AttributeError(name)
        return getattr(self.pipeline, name)


def _name_pictures(dataset: Dataset) -> None:
    for inner in (getattr(dataset, 'dataset', None), *getattr(dataset, 'datasets', ())):
        if inner is not None:
            _name_pictures(inner)
    pipeline = getattr(dataset, 'pipeline', None)
    if callable(pipeline) and not isinstance(pipeline, NamingPipeline):
        dataset.pipeline = NamingPipeline(pipeline)  # type: ignore[attr-defined]

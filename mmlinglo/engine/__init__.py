# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from .errors import TrainingError
from .hooks import AverageBuffersHook, MainProcessLoggerHook
from .launch import end_with_torchrun, prepare_cpu_distributed
from .layer_decay import LayerDecayOptimWrapperConstructor
from .non_finite_loss_hook import NonFiniteLossHook
from .picture_errors_hook import PictureErrorsHook
from .progress_hook import ProgressHook
from .reseed_hook import ReseedHook
from .runner import QuietRunner, TrainingRunner, fit_schedulers
from .safe_checkpoint_hook import SafeCheckpointHook

__all__ = [
    'AverageBuffersHook',
    'LayerDecayOptimWrapperConstructor',
    'MainProcessLoggerHook',
    'NonFiniteLossHook',
    'PictureErrorsHook',
    'ProgressHook',
    'QuietRunner',
    'ReseedHook',
    'SafeCheckpointHook',
    'TrainingError',
    'TrainingRunner',
    'end_with_torchrun',
    'fit_schedulers',
    'prepare_cpu_distributed',
]

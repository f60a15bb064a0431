# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from .errors import TrainingError
from .hooks import AverageBuffersHook
from .launch import end_with_torchrun, prepare_cpu_distributed
from .layer_decay import LayerDecayOptimWrapperConstructor
from .non_finite_loss_hook import NonFiniteLossHook
from .picture_errors_hook import PictureErrorsHook
from .reseed_hook import ReseedHook
from .safe_checkpoint_hook import SafeCheckpointHook

__all__ = [
    'AverageBuffersHook',
    'LayerDecayOptimWrapperConstructor',
    'NonFiniteLossHook',
    'PictureErrorsHook',
    'ReseedHook',
    'SafeCheckpointHook',
    'TrainingError',
    'end_with_torchrun',
    'prepare_cpu_distributed',
]

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from .hooks import AverageBuffersHook
from .launch import prepare_cpu_distributed
from .layer_decay import LayerDecayOptimWrapperConstructor

__all__ = ['AverageBuffersHook', 'LayerDecayOptimWrapperConstructor', 'prepare_cpu_distributed']

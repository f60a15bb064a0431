# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from .hooks import AverageBuffersHook
from .launch import prepare_cpu_distributed

__all__ = ['AverageBuffersHook', 'prepare_cpu_distributed']

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from .linglo import LinGlo

__all__ = ['LinGlo']

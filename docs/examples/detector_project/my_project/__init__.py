# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from .gated_linglo import GatedLinGlo

__all__ = ['GatedLinGlo']

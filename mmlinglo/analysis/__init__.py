# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from .saliency import SaliencyMaps, saliency_maps

__all__ = ['SaliencyMaps', 'saliency_maps']

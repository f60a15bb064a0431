# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""LinGlo backbones (arXiv 2207.00188) for mmpretrain, mmdetection and mmsegmentation.

Importing this package registers ``LinGlo`` in mmengine's root registry, so
that ``custom_imports = dict(imports=['mmlinglo'])`` is all that a config needs
to say ``type='LinGlo'``. It needs torch, mmengine and the Python part of mmcv;
none of the toolboxes and no compiled operator.
"""

from mmlinglo.models import ConditionalPositionalEncoding, KeyOnlyAttention, LinGlo
from mmlinglo.version import __version__

__all__ = ['ConditionalPositionalEncoding', 'KeyOnlyAttention', 'LinGlo', '__version__']

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""LinGlo backbones (arXiv 2207.00188) for mmpretrain, mmdetection and mmsegmentation.

Importing this package registers ``LinGlo`` in mmengine's root registry, so
that ``custom_imports = dict(imports=['mmlinglo'])`` is all that a config needs
to say ``type='LinGlo'``. It needs torch, mmengine and the Python part of mmcv;
none of the toolboxes and no compiled operator.
"""

import sys

from mmlinglo.version import __version__

try:
    import mmlinglo.mmcv_ops  # noqa: F401  # before mmcv.ops, for which it may stand in
    from mmlinglo.hub import get_config, get_model, list_models, register_in_mmpretrain
    from mmlinglo.models import ConditionalPositionalEncoding, KeyOnlyAttention, LinGlo, literal
except Exception:
    if sys.argv[:1] != ['-m']:  # `python -m mmlinglo.check_env` must be able to say what is wrong
        raise
else:
    register_in_mmpretrain()

__all__ = [
    'ConditionalPositionalEncoding',
    'KeyOnlyAttention',
    'LinGlo',
    '__version__',
    'get_config',
    'get_model',
    'list_models',
    'literal',
]

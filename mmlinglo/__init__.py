# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""LinGlo backbones (arXiv 2207.00188) for mmpretrain, mmdetection and mmsegmentation.

Importing this package registers ``LinGlo`` in mmengine's root registry, so
that ``custom_imports = dict(imports=['mmlinglo'])`` is all that a config needs
to say ``type='LinGlo'``. It needs torch, mmengine and the Python part of mmcv;
none of the toolboxes and no compiled operator. :mod:`mmlinglo.timm` needs torch
and timm only.
"""

import sys
from typing import Any, Optional

from mmlinglo.version import __version__

_missing: Optional[str] = None


def require_openmmlab() -> None:
    """Raise ModuleNotFoundError if mmengine or mmcv is missing, without which the rest cannot work."""
    if _missing is not None:
        raise ModuleNotFoundError(
            f'mmlinglo needs {_missing}, which is not installed: '
            'python -m pip install onedl-mmengine onedl-mmcv',
            name=_missing,
        )


try:
    import mmlinglo.mmcv_ops  # noqa: F401  # before mmcv.ops, for which it may stand in
    from mmlinglo.hub import get_config, get_model, list_models, register_in_mmpretrain
    from mmlinglo.models import ConditionalPositionalEncoding, KeyOnlyAttention, LinGlo, literal
except Exception as error:
    package = (getattr(error, 'name', None) or '').partition('.')[0]
    if isinstance(error, ModuleNotFoundError) and package in ('mmengine', 'mmcv'):
        _missing = package
    # `python -m mmlinglo.check_env` and `mmlinglo check-env` must be able to say what is wrong.
    elif not {'mmlinglo.check_env', 'check-env'}.intersection(getattr(sys, 'orig_argv', ())):
        raise

__all__ = [
    'ConditionalPositionalEncoding',
    'KeyOnlyAttention',
    'LinGlo',
    '__version__',
    'get_config',
    'get_model',
    'list_models',
    'literal',
    'register_in_mmpretrain',
]


def __getattr__(name: str) -> Any:
    """What could not be imported. :mod:`mmlinglo.timm` does without."""
    if name in __all__:
        require_openmmlab()
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""mmlinglo's registries, children of mmengine's.

If a config of any toolbox says ``type='mmlinglo.X'``, mmengine imports this module and then the
``locations`` of the registry that it searches.
"""

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import WEIGHT_INITIALIZERS as MMENGINE_WEIGHT_INITIALIZERS
from mmengine.registry import Registry

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='mmlinglo',
    locations=['mmlinglo.models'],
)
HOOKS = Registry(
    'hook',
    parent=MMENGINE_HOOKS,
    scope='mmlinglo',
    locations=['mmlinglo.engine'],
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='mmlinglo',
    locations=['mmlinglo.engine'],
)
WEIGHT_INITIALIZERS = Registry(
    'weight initializer',
    parent=MMENGINE_WEIGHT_INITIALIZERS,
    scope='mmlinglo',
    locations=['mmlinglo.utils.pvtv2'],
)

# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Recipes by name, in the words of mmpretrain's and mmengine's hubs.

mmpretrain lets others add names to its own hub, and is given our classifiers. mmdet and mmseg look
names up in their own packages only; their functions take a config, which :func:`get_config` gives.
"""

import difflib
import fnmatch
from pathlib import Path
from typing import Dict, List, Union

import yaml
from mmengine.config import Config
from torch import nn

from .utils import load_checkpoint_file, load_model_weights
from .utils.deploy import build_model

PACKAGE = Path(__file__).resolve().parent
CLASSIFIERS = 'configs/imagenet/metafile.yml'
NO_WEIGHTS = """\
nobody has published weights of {name!r}. Either
  - train it: tools/train.py {config}, or
  - load a file of your own: mmlinglo.get_model({name!r}, pretrained=FILE)"""


def list_models(pattern: str = '*') -> List[str]:
    """Names of the recipes for ImageNet, COCO and ADE20K.

    Args:
        pattern: Beginning of the names, in which ``*`` and ``?`` are wildcards.

    Returns:
        The names, sorted.
    """
    return sorted(fnmatch.filter(_recipes(), f'{pattern}*'))


def get_config(name: str) -> Config:
    """Read the config of a recipe, for the functions of mmdet, mmseg and mmpretrain that take one.

    Args:
        name: One of :func:`list_models`, such as ``'retinanet_linglo-b1_fpn_1x_coco'``,
            or the name of another config in this project's ``configs/``.

    Raises:
        ValueError: If there is no such recipe; names the most similar ones.
    """
    return Config.fromfile(find_recipe(name))


def find_recipe(name: str) -> Path:
    """Find the config file of a recipe.

    Args:
        name: File name of a config in this project's ``configs/``, without ``.py``.

    Raises:
        ValueError: If there is no such recipe; names the most similar ones.
    """
    paths = {path.stem: path for path in find_root().glob('configs/[!_]*/*.py')}
    if name not in paths:
        similar = sorted(fnmatch.filter(paths, f'{name}*'))[:3]
        similar = similar or difflib.get_close_matches(name, paths)
        raise ValueError(
            f'no recipe is named {name!r}. '
            + (f'Did you mean {" or ".join(map(repr, similar))}? ' if similar else '')
            + 'mmlinglo.list_models() gives all names'
        )
    return paths[name]


def get_model(name: str, pretrained: Union[bool, str] = False) -> nn.Module:
    """Build the classifier, detector or segmentor of a recipe.

    Args:
        name: One of :func:`list_models`.
        pretrained: Checkpoint of this recipe: path, URL, or URI of any mmengine file
            backend. It is loaded whole or not at all. False for random weights.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        ValueError: If there is no such recipe, or ``pretrained`` is True: there are no
            published weights.
        FileNotFoundError: If the checkpoint does not exist.
        CheckpointError: If it is damaged or of another model.
    """
    cfg = get_config(name)
    if pretrained is True:
        config = f'configs/{Path(cfg.filename).parent.name}/{name}.py'
        raise ValueError(NO_WEIGHTS.format(name=name, config=config))
    model = build_model(cfg)
    if pretrained:
        load_model_weights(model, load_checkpoint_file(pretrained), pretrained)
    return model.eval()


def register_in_mmpretrain() -> None:
    """Add our classifiers to mmpretrain's hub, so that ``mmpretrain.get_model`` knows their names.

    A second call does nothing, and so does the first one of a package that was copied from
    somewhere without its configs.

    Raises:
        ModuleNotFoundError: If mmpretrain is not installed.
    """
    from mmpretrain.apis.model import ModelHub  # mmlinglo itself must not import it

    if (find_root() / CLASSIFIERS).is_file() and not any(map(ModelHub.has, _recipes())):
        ModelHub.register_model_index(find_root() / CLASSIFIERS, config_prefix=find_root())


def find_root() -> Path:
    """Folder of ``configs/``: of the installed package or, if it is not installed, the checkout."""
    mim = PACKAGE / '.mim'
    return mim if (mim / 'model-index.yml').is_file() else PACKAGE.parent


def _recipes() -> Dict[str, dict]:
    """Rows of the metafiles by name."""
    root = find_root()
    metafiles = yaml.safe_load((root / 'model-index.yml').read_text())['Import']
    models = [m for path in metafiles for m in yaml.safe_load((root / path).read_text())['Models']]
    return {model['Name']: model for model in models}

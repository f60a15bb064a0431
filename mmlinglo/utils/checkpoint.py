# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Checkpoints that either load whole or raise, and never run code from a file."""

import json
import os.path as osp
from pickle import UnpicklingError
from types import ModuleType
from typing import Dict, List, Optional

import numpy as np
import torch
from mmengine.fileio import get_local_path
from mmengine.logging import HistoryBuffer, print_log
from torch import Tensor, nn

MISSING_PRETRAINED = """\
pretrained weights {source!r} not found. Either
  - train them: bash tools/dist_train.sh configs/imagenet/linglo-b0_8xb128_in1k.py 8 (or b1, b2), or
  - name another file or URL: --cfg-options model.backbone.init_cfg.checkpoint=FILE, or
  - train from scratch: --cfg-options model.backbone.init_cfg=None"""


class CheckpointError(RuntimeError):
    """A checkpoint that is unreadable, unsafe, or of another model."""


def load_checkpoint_file(source: str) -> dict:
    """Read a checkpoint onto the CPU without running code from it.

    Besides tensors and plain containers only the classes that mmengine's
    runner puts into its checkpoints are accepted. torch below 2.5 cannot make
    that exception; there the file is unpickled in full, as mmengine does.

    Args:
        source: Path, URL, or URI of any mmengine file backend. A name that ends with
            ``.safetensors`` is read as such.

    Returns:
        The content, always a dict.

    Raises:
        FileNotFoundError: If a local path does not exist.
        CheckpointError: If the file is damaged or holds other classes.
    """
    source = osp.expanduser(source)
    if '://' not in source and not osp.isfile(source):
        raise FileNotFoundError(f'checkpoint {source!r} not found')
    if source.endswith('.safetensors'):
        return _load_safetensors(source)
    try:
        if source.startswith(('http://', 'https://')):
            checkpoint = _torch_load(torch.hub.load_state_dict_from_url, source)
        else:
            with get_local_path(source) as path:
                checkpoint = _torch_load(torch.load, path)
    except UnpicklingError as error:
        raise CheckpointError(
            f'{source!r} is no checkpoint that can be read safely: {_first_line(error)}'
        ) from error
    except (RuntimeError, EOFError) as error:
        raise CheckpointError(f'{source!r} is damaged: {_first_line(error)}') from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(
            f'{source!r} holds a {type(checkpoint).__name__}, expected a dict with weights'
        )
    return checkpoint


def _load_safetensors(source: str) -> dict:
    """Tensors as ``state_dict``, and as ``meta`` what ``publish_model.py`` wrote beside them."""
    safetensors = import_safetensors()
    try:
        with get_local_path(source) as path, safetensors.safe_open(path, framework='pt') as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}
            meta = json.loads((file.metadata() or {}).get('meta', '{}'))
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f'{source!r} is damaged: {_first_line(error)}') from error
    return dict(meta=meta, state_dict=weights)


def import_safetensors() -> ModuleType:
    """The optional package safetensors.

    Raises:
        CheckpointError: If it is not installed.
    """
    try:
        import safetensors.torch  # needed here only
    except ModuleNotFoundError as error:
        raise CheckpointError(
            'files in safetensors format need the package of that name: pip install safetensors'
        ) from error
    return safetensors


def find_state_dict(checkpoint: dict) -> Dict[str, Tensor]:
    """Weights inside a checkpoint of mmengine, timm or PVT, without ``module.`` prefixes."""
    for key in ('state_dict', 'state_dict_ema', 'model'):
        if isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    return {
        key[len('module.') :] if key.startswith('module.') else key: value
        for key, value in checkpoint.items()
        if isinstance(value, Tensor)
    }


def load_model_weights(model: nn.Module, checkpoint: dict, source: str) -> None:
    """Load a whole model; all tensors must be there with the right shapes and no others.

    Args:
        model: The model; it is not touched if the weights do not fit.
        checkpoint: What :func:`load_checkpoint_file` returned.
        source: Name for the error message.

    Raises:
        CheckpointError: If the weights are another model's.
    """
    weights, expected = find_state_dict(checkpoint), model.state_dict()
    _check(weights, expected, source, unexpected=[key for key in weights if key not in expected])
    model.load_state_dict(weights)


def load_pretrained_backbone(
    backbone: nn.Module, source: str, prefix: Optional[str] = None
) -> None:
    """Load a backbone out of a classifier, detector, segmentor or bare backbone.

    Every tensor of ``backbone`` must be found, except output norms (``norm0``,
    ``norm1``, ...), which exist only for the stages that the source returned.
    The numbers go to the log.

    Args:
        backbone: The backbone; it is not touched if the weights do not fit.
        source: Path, URL, or URI of any mmengine file backend.
        prefix: Prefix of the backbone's tensors in the file. Defaults to
            ``'backbone.'`` if the file has such tensors, else to none.

    Raises:
        FileNotFoundError: If ``source`` does not exist; says what to do.
        CheckpointError: If tensors are missing or have other shapes.
    """
    try:
        weights = find_state_dict(load_checkpoint_file(source))
    except FileNotFoundError as error:
        raise FileNotFoundError(MISSING_PRETRAINED.format(source=source)) from error
    prefix = (prefix or 'backbone').rstrip('.') + '.'
    if any(key.startswith(prefix) for key in weights):
        weights = {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}

    expected = backbone.state_dict()
    output_norms = {key for key in expected if key.split('.')[0][:-1] == 'norm'}
    new = [key for key in expected if key in output_norms and key not in weights]
    shared = {key: weights[key] for key in expected if key in weights}
    _check(shared, {k: v for k, v in expected.items() if k not in new}, source, unexpected=[])
    backbone.load_state_dict(shared, strict=False)
    print_log(
        f'{type(backbone).__name__}: loaded {len(shared)} of {len(expected)} backbone tensors '
        f'from {source}' + (f'; not in the file, newly initialized: {", ".join(new)}' * bool(new)),
        logger='current',
    )


def _check(
    weights: Dict[str, Tensor], expected: Dict[str, Tensor], source: str, unexpected: List[str]
) -> None:
    # Files written before torch 1.0 have no batch counter; it is not part of the network.
    missing = [k for k in expected if k not in weights and 'num_batches_tracked' not in k]
    shapes = [
        f'{key} {tuple(weights[key].shape)} instead of {tuple(value.shape)}'
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    problems = [
        f'{len(keys)} tensors {what}: {_shorten(keys)}'
        for what, keys in (
            ('missing', missing),
            ('of another shape', shapes),
            ('unexpected', unexpected),
        )
        if keys
    ]
    if not problems:
        return
    hint = ''
    if any('.reparam.' in key for key in missing):
        hint = (
            '. The model is built with deploy=True: convert the file with reparameterize_model.py'
        )
    elif any('.branches.' in key for key in missing) and not any(
        '.branches.' in k for k in weights
    ):
        hint = '. If the file was re-parameterised, build the model with deploy=True'
    raise CheckpointError(f'{source!r} does not fit this model: ' + '; '.join(problems) + hint)


def _shorten(items: List[str], limit: int = 4) -> str:
    more = len(items) - limit
    return ', '.join(items[:limit]) + (f' and {more} more' if more > 0 else '')


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _torch_load(load, source: str):  # noqa: ANN001, ANN202
    if not hasattr(torch.serialization, 'safe_globals'):
        return load(source, map_location='cpu')
    core = np._core if hasattr(np, '_core') else np.core
    runner_classes = [
        HistoryBuffer,
        core.multiarray._reconstruct,
        core.multiarray.scalar,
        np.ndarray,
        np.dtype,
        *(type(np.dtype(name)) for name in ('float64', 'float32', 'int64', 'uint32')),
        getattr,  # of HistoryBuffer's methods; what it returns cannot be called by the file
    ]
    with torch.serialization.safe_globals(runner_classes):
        return load(source, map_location='cpu', weights_only=True)

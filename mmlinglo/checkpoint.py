# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Load checkpoints completely or not at all, without running code from the file."""

import hashlib
import importlib
import json
import os
import os.path as osp
import re
from pickle import UnpicklingError
from types import ModuleType
from typing import Any, Dict, List, Optional, Tuple
from urllib.parse import urlparse

import torch
from mmengine.fileio import get_local_path
from mmengine.logging import print_log
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

from .safe_globals import runner_globals

MISSING_PRETRAINED = """\
pretrained weights {source!r} not found. Either
  - train them: bash tools/dist_train.sh configs/imagenet/linglo-b0_8xb128_in1k.py 8 (or b1, b2), or
  - name another file or URL: --cfg-options model.backbone.init_cfg.checkpoint=FILE, or
  - train from scratch: --cfg-options model.backbone.init_cfg=None"""
NOT_RESUMABLE = (
    '--resume continues the same training, with the same model, optimizer and paramwise_cfg. To start '
    'another one from these weights, leave it out: '
    '--cfg-options load_from={source} takes those that fit'
)
UNSAFE = (
    '{source!r} cannot be read safely: {reason}. Loading it in full would run any code in it. '
    'Only if you know who made it, give --trust-checkpoint to the tool, or convert it to a file that needs '
    'no trust: tools/model_converters/publish_model.py --trust-checkpoint'
)
# Wrappers, by the part that they add to names: `module` in front, `_orig_mod` anywhere.
WRAPPERS = {'module': 'DistributedDataParallel or EMA', '_orig_mod': 'torch.compile'}
# All schemes of mmengine except those of model zoos, which use the unsafe loader of URLs.
SCHEMES = ['', 'http://', 'https://', r'(\S+\:)?s3://', r'(\S+\:)?petrel://', 'pavi://']


class CheckpointError(RuntimeError):
    """A checkpoint that is unreadable, unsafe, or of another model."""


def load_checkpoint_file(source: str, trust: bool = False) -> dict:
    """Read a checkpoint onto the CPU without running code from it.

    The function accepts tensors, plain containers, and the classes that mmengine's runner puts
    into its checkpoints.

    Args:
        source: Path, URL, or URI of any mmengine file backend. A name that ends with
            ``.safetensors`` is read in that format.
        trust: Whether to unpickle the file in full, which runs any code in it.

    Returns:
        The content, always a dict. If it has ``meta``, that is a dict too.

    Raises:
        FileNotFoundError: If a local path does not exist.
        CheckpointError: If the file is damaged or holds other classes.
    """
    source = osp.expanduser(source)
    if '://' not in source and not osp.isfile(source):
        raise FileNotFoundError(f'checkpoint {source!r} not found')
    try:
        if source.startswith(('http://', 'https://')):
            checkpoint = _read(_downloaded(source), source, trust)
        else:
            with get_local_path(source) as path:
                checkpoint = _read(path, source, trust)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f'{source!r} cannot be read: {_reason(error)}') from error
    except Exception as error:  # a damaged or forged file can cause any exception
        reason = _reason(error)
        if isinstance(error, UnpicklingError) and 'operand' not in reason:
            message = UNSAFE.format(source=source, reason=reason)
        else:
            message = f'{source!r} is damaged or not a checkpoint: {reason}'
        raise CheckpointError(message) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(
            f'{source!r} holds a {type(checkpoint).__name__}, expected a dict with weights'
        )
    if not isinstance(checkpoint.get('meta', {}), (dict, type(None))):
        raise CheckpointError(f"{source!r} is not a checkpoint: its 'meta' is not a dict")
    return checkpoint


def use_in_mmengine(trust: bool = False) -> None:
    """Make mmengine read checkpoints with :func:`load_checkpoint_file`, in this process.

    mmengine's own loader first tries to read safely, but accepts classes that run code. Then it
    reads in full. This function replaces it for the files that the runner loads and resumes from,
    and for the ``Pretrained`` weights of all models. It reads them onto the CPU, and refuses weights
    with NaN. For what mmengine loads in other ways, such as from model zoos, it tells torch itself
    to read safely.

    Args:
        trust: Whether to unpickle the files in full.
    """

    def load_from_file(filename: str, *_: Any, **__: Any) -> dict:
        checkpoint = load_checkpoint_file(filename, trust)
        weights = find_state_dict(checkpoint)
        check_finite(weights, filename)
        if isinstance(checkpoint.get('state_dict'), dict):
            checkpoint['state_dict'] = {
                **{k: v for k, v in checkpoint['state_dict'].items() if not isinstance(v, Tensor)},
                **weights,
            }
        if not trust and checkpoint.get('meta'):
            checkpoint['meta'].pop('config', None)  # Python that Runner.resume would run
        return checkpoint

    CheckpointLoader.register_scheme(SCHEMES, load_from_file, force=True)
    if not trust:
        os.environ.pop('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', None)  # torch refuses both
        os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'


def _read(path: str, source: str, trust: bool) -> Any:
    if source.endswith('.safetensors'):
        return _load_safetensors(path)
    if trust:
        return torch.load(path, map_location='cpu', weights_only=False)
    with torch.serialization.safe_globals(runner_globals()):
        return torch.load(path, map_location='cpu', weights_only=True)


def _downloaded(url: str) -> str:
    """Download a file into torch.hub's folder, once for each URL, and check the hash in its name.

    torch.hub's own loader keeps one file for each base name, unpacks old archives, and reads in full.

    Raises:
        CheckpointError: If the name ends with other digits of the SHA-256 hash than the file has.
    """
    name = osp.basename(urlparse(url).path)
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    path = osp.join(torch.hub.get_dir(), 'checkpoints', f'{key}-{name}')
    if not osp.exists(path):
        # 8 digits, as publish_model.py and OpenMMLab write them; a date is no hash
        found = re.search(r'-(?!\d{8}\.)([0-9a-f]{8})\.\w+$', name)
        os.makedirs(osp.dirname(path), exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path, found[1] if found else None)
        except RuntimeError as error:
            raise CheckpointError(
                f'{url!r} was damaged on the way or is another file than its name says: {error}'
            ) from error
    return path


def _load_safetensors(path: str) -> dict:
    """Read the tensors as ``state_dict``, and the metadata of ``publish_model.py`` as ``meta``."""
    with import_optional('safetensors.torch', 'the format safetensors').safe_open(
        path, framework='pt'
    ) as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}
        meta = json.loads((file.metadata() or {}).get('meta', '{}'))
    return dict(meta=meta, state_dict=weights)


def import_optional(module: str, purpose: str) -> ModuleType:
    """Import a module of an optional package.

    Raises:
        CheckpointError: If it is not installed. It says what needs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split('.')[0]
        raise CheckpointError(
            f'{purpose} needs the package {package}: pip install {package}'
        ) from error


def find_state_dict(checkpoint: dict) -> Dict[str, Tensor]:
    """Find the weights inside a checkpoint of mmengine, timm or PVT.

    The function removes the prefixes that wrappers of a model leave in the names: ``module.`` of
    ``DistributedDataParallel`` and of averages (EMA), and ``_orig_mod.`` of ``torch.compile``, in
    any order. If it removes any, it logs a line.
    """
    for key in ('state_dict', 'state_dict_ema', 'model'):
        if isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    weights = {
        key: value
        for key, value in checkpoint.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    plain = _unwrap(weights)
    found = {
        WRAPPERS[part]
        for key in weights.keys() - plain.keys()
        for part in WRAPPERS.keys() & key.split('.')
    }
    if found:
        print_log(f'names of weights: prefixes of {" and ".join(sorted(found))} removed', 'current')
    return plain


def _unwrap(weights: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Remove wrappers' prefixes from the names, unless two names would become the same."""
    plain = {}
    for key, value in weights.items():
        parts = key.split('.')
        while parts[0] in WRAPPERS and len(parts) > 1:
            parts.pop(0)
        plain['.'.join(part for part in parts if part != '_orig_mod')] = value
    if len(plain) < len(weights):
        return weights
    if any(re.match(r'(_orig_mod\.)*module\.', key) for key in weights):
        for counter in ('n_averaged', 'steps'):  # from torch's and mmengine's averages
            plain.pop(counter, None)
    return plain


def load_model_weights(model: nn.Module, checkpoint: dict, source: str) -> None:
    """Load a whole model. All its tensors must be there, with the right shapes, and no others.

    Args:
        model: The model. It stays as it is if the weights do not fit.
        checkpoint: What :func:`load_checkpoint_file` returned.
        source: Name for the error message.

    Raises:
        CheckpointError: If the weights are of another model, or not finite.
    """
    weights, expected = find_state_dict(checkpoint), model.state_dict()
    check_fit(weights, expected, source)
    check_finite(weights, source, expected)
    model.load_state_dict(weights)


def check_finite(
    weights: Dict[str, Tensor], source: str, expected: Optional[Dict[str, Tensor]] = None
) -> None:
    """Refuse weights with NaN, such as a diverged training leaves. Every output would be NaN.

    Args:
        weights: The weights.
        source: Name for the error message.
        expected: Weights of a model of this kind. If you give them, infinities are refused too,
            except where this model has them itself, as in attention masks.

    Raises:
        CheckpointError: If there are such weights. It names the tensors.
    """
    wrong = []
    for key, value in weights.items():
        if not _is_plain(value):
            continue
        unusable = value.isnan()
        if expected is not None and key in expected:
            unusable = ~value.isfinite() & expected[key].isfinite().to(value.device)
        if unusable.any():
            wrong.append(f'{key} ({int(unusable.sum())} of {value.numel()} numbers)')
    if wrong:
        raise CheckpointError(
            f'{source!r} has {len(wrong)} tensors with NaN or infinity: {_shorten(wrong)}. '
            'Its training has diverged: take an earlier checkpoint'
        )


def load_pretrained_backbone(
    backbone: nn.Module, source: str, prefix: Optional[str] = None
) -> None:
    """Load a backbone from a checkpoint of a classifier, detector, segmentor or bare backbone.

    The file must have every tensor of ``backbone``, except output norms (``norm0``, ``norm1``,
    ...): they exist only for the stages that the source returned. Its stem and its stages, as far
    as ``backbone`` has them, must have no other tensors. The log says how many were loaded.

    Args:
        backbone: The backbone. It stays as it is if the weights do not fit.
        source: Path, URL, or URI of any mmengine file backend.
        prefix: Prefix of the backbone's tensors in the file. Defaults to
            ``'backbone.'``. A file without this one may have none.

    Raises:
        FileNotFoundError: If ``source`` does not exist. It says what to do.
        CheckpointError: If no tensor has the prefix, or if tensors are missing, have other shapes,
            are of another network or not finite.
    """
    try:
        weights = find_state_dict(load_checkpoint_file(source))
    except FileNotFoundError as error:
        raise FileNotFoundError(MISSING_PRETRAINED.format(source=source)) from error
    prefix = (prefix or 'backbone').rstrip('.') + '.'
    if any(key.startswith(prefix) for key in weights):
        weights = {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
        weights = _unwrap(weights)
    elif prefix != 'backbone.':
        found = {k[: k.index('patch_embed.')] for k in weights if 'patch_embed.' in k}
        found = found or {f'{key.split(".")[0]}.' for key in weights}
        raise CheckpointError(
            f'{source!r} has no tensors with the prefix {prefix!r}: name one that it has, or leave '
            f'it out. It has {_shorten(sorted(map(repr, found))) or "no tensors"}'
        )

    expected = backbone.state_dict()
    output_norms = {key for key in expected if key.split('.')[0][:-1] == 'norm'}
    new = [key for key in expected if key in output_norms and key not in weights]
    shared = {key: weights[key] for key in expected if key in weights}
    required = {key: value for key, value in expected.items() if key not in new}
    built = [n for n, _ in backbone.named_modules() if re.fullmatch(r'patch_embed|stages\.\d+', n)]
    check_fit(weights, required, source, tuple(f'{name}.' for name in built))
    check_finite(shared, source, expected)
    backbone.load_state_dict(shared, strict=False)
    print_log(
        f'{type(backbone).__name__}: loaded {len(shared)} of {len(expected)} backbone tensors '
        f'from {source}' + (f'; not in the file, newly initialized: {", ".join(new)}' * bool(new)),
        logger='current',
    )


def check_fit(
    weights: Dict[str, Tensor],
    expected: Dict[str, Tensor],
    source: str,
    complete: Tuple[str, ...] = ('',),
) -> None:
    """Raise CheckpointError if tensors are missing, of another shape or unexpected.

    Those that ``expected`` has not are unexpected if their names begin with one of ``complete``.
    """
    expected = {key: value for key, value in expected.items() if isinstance(value, Tensor)}
    # Files written before torch 1.0 have no batch counter; it is not part of the network.
    missing = [k for k in expected if k not in weights and 'num_batches_tracked' not in k]
    shapes = [
        f'{key} {tuple(weights[key].shape)} instead of {tuple(value.shape)}'
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    unexpected = [key for key in weights if key not in expected and key.startswith(complete)]
    odd = [key for key in expected if key in weights and not _is_plain(weights[key])]
    problems = [
        f'{len(keys)} tensors {what}: {_shorten(keys)}'
        for what, keys in (
            ('missing', missing),
            ('of another shape', shapes),
            ('sparse, quantized or without values', odd),
            ('unexpected', unexpected),
        )
        if keys
    ]
    if not problems:
        return
    hint = ''
    in_file, differing = ' '.join(weights), ' '.join([*missing, *shapes, *unexpected])
    longer = [key for key in weights if missing and key.endswith(f'.{missing[0]}')]
    if longer:
        prefix = longer[0][: -len(missing[0])]
        hint = f'The file has {missing[0]} as {longer[0]}: name the prefix {prefix!r}, or remove it'
    elif '.reparam.' in differing and '.branches.' in in_file:
        hint = 'The model is built with deploy=True: convert the file with reparameterize_model.py'
    elif '.branches.' in differing and '.reparam.' in in_file:
        hint = 'The file was re-parameterised: build the model with deploy=True'
    elif 'stages.' in differing and 'stages.' in in_file:
        hint = (
            'The file has another backbone: build the model with its arch, pos_encoding, layout, '
            'qkv_bias and so on, or name another file'
        )
    problem = '; '.join(problems) + '. ' * bool(hint) + hint
    raise CheckpointError(f'{source!r} does not fit this model: {problem}')


def _is_plain(weight: Tensor) -> bool:
    return weight.layout == torch.strided and not weight.is_quantized and not weight.is_meta


def _shorten(items: List[str], limit: int = 4) -> str:
    more = len(items) - limit
    return ', '.join(items[:limit]) + (f' and {more} more' if more > 0 else '')


def _reason(error: Exception) -> str:
    """Take the first sentence of an error. For torch's safe reader, skip its advice."""
    if isinstance(error, UnpicklingError) and isinstance(error.__context__, UnpicklingError):
        error = error.__context__
    text = str(error).strip()
    if isinstance(error, LookupError) or not text:  # a key of the reader's says nothing by itself
        text = f'{type(error).__name__} {text}'.strip()
    return re.split(r'\.?(?:\s*\n|\.\s|\.$)', text, maxsplit=1)[0]

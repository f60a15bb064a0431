# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Write the weights of a training as a small file that is safe to give away.

Optimizer, schedules and logs are dropped; the data set's classes, the config's text and versions stay.
The file can be read with torch.load(..., weights_only=True), and its name ends with the first 8 digits of
its SHA-256, which torch.hub can check.
"""

import argparse
import hashlib
import io
import json
from pathlib import Path
from typing import Any, Dict

import numpy as np
import torch
from mmengine.config import DictAction
from torch import Tensor

import mmlinglo
from mmlinglo.utils import CheckpointError, load_checkpoint_file, load_model_weights
from mmlinglo.utils.checkpoint import check_finite, find_state_dict, import_safetensors
from mmlinglo.utils.cli import UsageError, add_trust_argument, load_config, run
from mmlinglo.utils.deploy import build_model
from mmlinglo.utils.files import complete_file


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'checkpoint', help='checkpoint of a training, or of reparameterize_model.py'
    )
    parser.add_argument(
        'out',
        help='file to write, such as linglo-b1_8xb128_in1k.pth; the hash is put before the suffix',
    )
    parser.add_argument(
        '--config',
        help="config whose model the weights must fit; its text replaces the checkpoint's",
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override settings of --config, such as model.backbone.deploy=True',
    )
    parser.add_argument(
        '--safetensors',
        action='store_true',
        help='write safetensors, which other programs read too',
    )
    add_trust_argument(parser)
    return parser.parse_args()


def plain(value: Any, name: str) -> Any:
    """``value`` made of nothing but what any reader accepts.

    Args:
        value: Entry of a checkpoint's ``meta``.
        name: Its name, for the error message.

    Raises:
        CheckpointError: If it holds an object of another class.
    """
    if isinstance(value, dict):
        return {
            plain(key, f'{name}.{key}'): plain(item, f'{name}.{key}') for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        items = [plain(item, f'{name}[{i}]') for i, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        return value.tolist()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(
        f'{name} of the checkpoint is a {type(value).__name__}, which a published file cannot hold: '
        'only numbers, texts, lists and dicts'
    )


def published_bytes(weights: Dict[str, Tensor], meta: dict, safetensors: bool) -> bytes:
    """Content of the file; the same for the same weights and metadata."""
    # Copies, since a part of a larger tensor would be saved with all of it.
    weights = {key: value.detach().clone().contiguous() for key, value in weights.items()}
    if safetensors:
        # Texts only; one, since the order of several in the file is random.
        return import_safetensors().torch.save(weights, metadata=dict(meta=json.dumps(meta)))
    buffer = io.BytesIO()  # into a file, torch would write the file's name as well
    torch.save(dict(meta=meta, state_dict=weights), buffer)
    return buffer.getvalue()


def main() -> None:
    args = parse_args()
    out = Path(args.out)
    suffix = '.safetensors' if args.safetensors else '.pth'
    if out.suffix != suffix:
        which = 'with' if args.safetensors else 'without'
        raise UsageError(
            f'{which} --safetensors, the name of the file must end with {suffix}: {out}'
        )
    if args.cfg_options is not None and args.config is None:
        raise UsageError('--cfg-options need --config')
    checkpoint = load_checkpoint_file(args.checkpoint, args.trust_checkpoint)
    weights = find_state_dict(checkpoint)
    if not weights:
        raise CheckpointError(f'{args.checkpoint!r} holds no weights')
    check_finite(weights, args.checkpoint)

    meta = dict(checkpoint.get('meta') or {})
    if args.config is not None:
        cfg = load_config(args.config, args.cfg_options)
        load_model_weights(build_model(cfg), checkpoint, args.checkpoint)
        meta['cfg'] = cfg.pretty_text
    meta['mmlinglo_version'] = mmlinglo.__version__
    content = published_bytes(weights, plain(meta, 'meta'), args.safetensors)

    digits = hashlib.sha256(content).hexdigest()[:8]
    published = out.with_name(f'{out.stem}-{digits}{suffix}')
    with complete_file(published) as file:
        file.write_bytes(content)
    dropped = [key for key in checkpoint if key not in ('meta', 'state_dict', 'model')]
    print(f'{published}: {len(weights)} tensors, {len(content) / 1e6:.1f} MB')
    if 'ema_state_dict' in checkpoint:
        print('the weights are the averages that EMAHook made and evaluated')
    if 'state_dict' in checkpoint and dropped:
        print(f'left out: {", ".join(dropped)}')
    for key in ('dataset_meta', 'cfg'):
        if key not in meta:
            print(f'warning: the checkpoint says nothing about {key}; inferencers will lack it')


if __name__ == '__main__':
    run(main)

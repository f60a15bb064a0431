# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Write the weights of a training as a small file that is safe to give away.

The file keeps the weights, the data set's classes, the config's text and the versions. It drops the optimizer,
schedules and logs. torch.load(..., weights_only=True) reads it. Its name ends with the first 8 digits of its SHA-256,
which torch.hub can check.
"""

import argparse
import hashlib
import io
import json
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
import torch
from mmengine.config import DictAction
from torch import Tensor

import mmlinglo
from mmlinglo.checkpoint import check_finite, find_state_dict, import_optional
from mmlinglo.utils import CheckpointError, load_checkpoint_file, load_model_weights
from mmlinglo.utils.cli import UsageError, add_trust_argument, key_value, load_config, run
from mmlinglo.utils.deploy import build_model
from mmlinglo.utils.files import complete_file


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('checkpoint', help='checkpoint of a training, or of reparameterize_model.py')
    text = 'file to write, such as linglo-b1_in1k.pth; the tool adds the hash before the suffix'
    add('out', help=text)
    add('--config', help="check that the weights fit this config's model, and store its text")
    text = 'override settings of --config, such as model.backbone.deploy=True'
    add('--cfg-options', nargs='+', type=key_value, action=DictAction, help=text)
    add('--safetensors', action='store_true', help='write safetensors, which other tools read too')
    add_trust_argument(parser)
    return parser.parse_args(argv)


def to_plain(value: Any, name: str) -> Any:
    """Convert a value to numbers, texts, lists and dicts, which any reader accepts.

    Args:
        value: Entry of a checkpoint's ``meta``.
        name: Name of the entry, for the error message.

    Raises:
        CheckpointError: If the value holds an object of another class.
    """
    if isinstance(value, dict):
        names = {key: f'{name}.{key}' for key in value}
        return {to_plain(k, names[k]): to_plain(item, names[k]) for k, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = (to_plain(item, f'{name}[{i}]') for i, item in enumerate(value))
        return tuple(items) if isinstance(value, tuple) else list(items)
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        return value.tolist()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(
        f'{name} of the checkpoint is a {type(value).__name__}; a published file can hold only '
        'numbers, texts, lists and dicts'
    )


def serialize(weights: Dict[str, Tensor], meta: dict, safetensors: bool) -> bytes:
    """Serialize a checkpoint. Equal weights and metadata give equal bytes."""
    # Copies, because torch saves the whole storage of a tensor that is part of a larger one.
    weights = {key: value.detach().clone().contiguous() for key, value in weights.items()}
    if safetensors:
        # Metadata must be texts. One text, because the file's order of several is random.
        save = import_optional('safetensors.torch', '--safetensors').save
        return save(weights, metadata=dict(meta=json.dumps(meta)))
    buffer = io.BytesIO()  # not a file, because torch would store the file's name
    torch.save(dict(meta=meta, state_dict=weights), buffer)
    return buffer.getvalue()


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    out = Path(args.out)
    which, suffix = ('with', '.safetensors') if args.safetensors else ('without', '.pth')
    if out.suffix != suffix:
        raise UsageError(f"{which} --safetensors, the file's name must end with {suffix}: {out}")
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
    content = serialize(weights, to_plain(meta, 'meta'), args.safetensors)
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
    return 0


if __name__ == '__main__':
    run(main)

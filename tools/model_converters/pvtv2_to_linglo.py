# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Make initial weights for LinGlo from a PVTv2 checkpoint of the same size: b0 from B0, b1 from B1, b2 from B2.

The checkpoint may be from timm, mmdet, the PVT repository, or your own training of PVTv2. The tool takes the
weights that both networks share. It fits the rest so that LinGlo computes about what PVTv2 computed. For
this, it reads some of the config's training images. The result is a start for a training, not a trained
LinGlo. mmlinglo/utils/pvtv2.py explains the method.
"""

import argparse
import itertools
import math
from pathlib import Path
from typing import List, Optional

import torch
from mmengine.runner import Runner, set_random_seed

import mmlinglo
from mmlinglo.analysis.report import at_least
from mmlinglo.utils import cli, load_checkpoint_file
from mmlinglo.utils.cli import UsageError
from mmlinglo.utils.deploy import build_model
from mmlinglo.utils.files import complete_file
from mmlinglo.utils.pvtv2 import convert_pvtv2, describe_conversion, load_pvtv2


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = cli.config_parser(__doc__)
    add = parser.add_argument
    add('checkpoint', help="PVTv2's checkpoint, a file or a URL")
    add('out', help='file to write')
    text = 'training images to use, rounded up to batches; default: %(default)s'
    add('--images', type=at_least(1), default=512, help=text)
    text = 'gradient steps for each attention and down-sampling layer; default: %(default)s'
    add('--steps', type=at_least(0), default=200, help=text)
    add('--seed', type=int, default=0, help='default: %(default)s')
    cli.add_trust_argument(parser)
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    cfg = cli.load_config(args.config, args.cfg_options)
    out = Path(args.out)
    if out.is_dir():
        raise UsageError(f'{args.out!r} is a folder: name a file')
    if out.exists() and Path(args.checkpoint).exists() and out.samefile(args.checkpoint):
        raise UsageError(f'{args.out!r} is the checkpoint itself: name another file')

    set_random_seed(args.seed)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    model = build_model(cfg)
    if not isinstance(model.backbone, mmlinglo.LinGlo):
        raise UsageError(
            f'the backbone of {args.config} must be a LinGlo, got {type(model.backbone).__name__}'
        )
    model.backbone.init_cfg = None  # in these configs, it names the file that this tool writes
    model.backbone.init_weights()
    model = model.to(device)
    checkpoint = load_checkpoint_file(args.checkpoint, args.trust_checkpoint)
    pvtv2 = load_pvtv2(checkpoint, model.backbone.arch, args.checkpoint)
    try:
        loader = Runner.build_dataloader(cfg.train_dataloader, seed=args.seed)
    except (AssertionError, FileNotFoundError) as error:  # not the classes, or nothing there
        raise UsageError(
            f'the training images of {cfg.filename!r} cannot be read ({error}): the conversion needs '
            'some of them; name their folder with --cfg-options '
            'train_dataloader.dataset.data_root=FOLDER'
        ) from error
    batches = itertools.islice(loader, max(2, math.ceil(args.images / loader.batch_size)))
    images = [model.data_preprocessor(data, training=True)['inputs'] for data in batches]
    origins, differences = convert_pvtv2(pvtv2, model.backbone, images, args.steps)
    origins = {f'backbone.{name}': origin for name, origin in origins.items()}
    head = getattr(getattr(model, 'head', None), 'fc', None)
    taken = {f'head.fc.{name}': value for name, value in pvtv2.head.state_dict().items()}
    if taken and head is not None and head.weight.shape == pvtv2.head.weight.shape:
        model.load_state_dict(taken, strict=False)
        origins.update(dict.fromkeys(taken, 'taken'))
    state = {name: value.cpu() for name, value in model.state_dict().items() if name in origins}
    source = dict(source=args.checkpoint, images=sum(map(len, images)), steps=args.steps)
    source.update(seed=args.seed, origins=origins, differences=differences)
    meta = dict(cfg=cfg.pretty_text, mmlinglo_version=mmlinglo.__version__, pvtv2=source)
    with complete_file(out) as file:
        torch.save(dict(meta=meta, state_dict=state), file)
    print(
        f'{out}: {describe_conversion(origins, differences)}\n'
        f"train from it with init_cfg=dict(type='Pretrained', checkpoint='{out}', prefix='backbone.')"
    )
    return 0


if __name__ == '__main__':
    cli.run(main)

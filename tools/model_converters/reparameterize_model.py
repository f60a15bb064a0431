# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Convert a trained classifier, detector or segmentor to its re-parameterised form.

The tool compares the outputs of both forms, and writes the file only if they agree.
"""

import argparse
import copy
from pathlib import Path
from typing import List, Optional

import torch

import mmlinglo
from mmlinglo.utils import CheckpointError, deploy, load_checkpoint_file, load_model_weights
from mmlinglo.utils.cli import UsageError, add_trust_argument, config_parser, load_config, run
from mmlinglo.utils.files import complete_file

TOLERANCE = 1e-4  # relative; float32 rounding of the fused weights gives about 1e-6


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = config_parser(__doc__)
    parser.add_argument('checkpoint', help='checkpoint of the training form')
    parser.add_argument('out', help='file to write')
    add_trust_argument(parser)
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    cfg = load_config(args.config, args.cfg_options)
    if cfg.model.get('backbone', {}).get('deploy', False):
        raise UsageError(
            f'{args.config} already builds the deployed form: give the config of the training form'
        )
    out = Path(args.out)
    if out.exists() and out.samefile(args.checkpoint):
        raise UsageError(f'{args.out!r} is the checkpoint itself: name another file')
    if out.is_dir():
        raise UsageError(f'{args.out!r} is a folder: name a file')
    checkpoint = load_checkpoint_file(args.checkpoint, args.trust_checkpoint)

    model = deploy.build_model(cfg).eval()
    if not deploy.has_deployed_form(model):
        raise UsageError(
            f'the model of {args.config} has no part that can be re-parameterised: '
            'use its checkpoint as it is'
        )
    load_model_weights(model, checkpoint, args.checkpoint)
    deployed = copy.deepcopy(model)
    deploy.switch_to_deploy(deployed)
    difference = deploy.relative_difference(model, deployed)
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f'the re-parameterised model differs from {args.checkpoint!r} by {difference:.1e} of '
            f'its largest output, more than {TOLERANCE:.0e}: nothing was written'
        )

    meta = dict(checkpoint.get('meta') or {})
    cfg.model.backbone.deploy = True
    meta.update(
        cfg=cfg.pretty_text,
        mmlinglo_version=mmlinglo.__version__,
        reparameterized=dict(relative_difference=difference),
    )
    with complete_file(out) as file:
        torch.save(dict(meta=meta, state_dict=deployed.state_dict()), file)
    before, after = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, deployed))
    print(
        f'{out}: {before:.2f} M -> {after:.2f} M parameters, outputs differ by {difference:.1e} '
        f'(relative)\nuse it with --cfg-options model.backbone.deploy=True'
    )
    return 0


if __name__ == '__main__':
    run(main)

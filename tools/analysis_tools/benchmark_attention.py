# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Latency and peak memory of LinGlo with key-only and with dot-product attention by input size.

The paper's Fig. 4 (there LinGlo-b0, batch 16, on a 32 GB V100: --memory-limit 32 on a larger GPU), as a
preset of benchmark_backbones.py --sweep, which takes all further options (--threads, --rounds, --dtype,
--max-seconds, --memory-limit, --channels-last). PyTorch's dot-product attention runs in a fused kernel
that never has the N x N matrix of all pairs in memory; a third curve is the same attention with it.
"""

import argparse
from typing import List, Optional

import torch
from benchmark_backbones import main as benchmark_backbones

from mmlinglo.utils.cli import run

ATTENTIONS = ('key_only', 'dot_product', 'dot_product_materialised')
# Device type: batch size and input sizes that take a few minutes.
DEFAULTS = {
    'cuda': (16, (224, 320, 416, 512, 608, 704, 800)),
    'cpu': (1, (128, 192, 256, 320, 384, 448, 512)),
}


def parse_args(argv: Optional[List[str]] = None) -> List[str]:
    """The arguments of benchmark_backbones.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--arch', choices=['b0', 'b1', 'b2'], default='b0', help='default: %(default)s')
    add('--attentions', nargs='+', choices=ATTENTIONS, default=ATTENTIONS, help='default: all')
    add('--sizes', nargs='+', help='input sizes in pixels; default: 128-512, on a GPU 224-800')
    add('--batch-size', help='default: 1 on a CPU, 16 on a GPU')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    add('--device', choices=list(DEFAULTS), default=device, help='default: %(default)s')
    add('--train-step', action='store_true', help='forward and backward of the training form')
    out = 'work_dirs/analysis/benchmark_attention'
    add('--out', default=out, help='path of the files, without suffix; default: %(default)s')
    args, others = parser.parse_known_args(argv)
    batch_size, sizes = DEFAULTS[args.device]
    names = [f'linglo_{args.arch}_{attention}' for attention in args.attentions]
    return [
        *('--sweep', '--models', *(name.removesuffix('_key_only') for name in names)),
        *('--sizes', *map(str, args.sizes or sizes)),
        *('--batch-size', args.batch_size or str(batch_size), '--device', args.device),
        *('--mode', 'train' if args.train_step else 'inference', '--out', args.out, *others),
    ]


def main(argv: Optional[List[str]] = None) -> int:
    return benchmark_backbones(parse_args(argv))


if __name__ == '__main__':
    run(main)

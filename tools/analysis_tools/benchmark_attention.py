# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Measure latency and peak memory of LinGlo with key-only and with dot-product attention, by input size.

This is the paper's Fig. 4. The paper measured LinGlo-b0 with batch 16 on a 32 GB V100: on a larger GPU, give
--memory-limit 32. The tool is a preset of benchmark_backbones.py --sweep, and takes its options. PyTorch
computes dot-product attention in a fused kernel, which never holds the N x N matrix of all pairs in memory.
A third curve shows the same attention with this matrix.
"""

from typing import List, Optional

from benchmark_backbones import make_parser, measure

from mmlinglo.analysis.report import explain_errors
from mmlinglo.utils.cli import run

ATTENTIONS = ('key_only', 'dot_product', 'dot_product_materialised')
# Device: batch size and input sizes that take a few minutes.
DEFAULTS = {
    'cuda': (16, [224, 320, 416, 512, 608, 704, 800]),
    'cpu': (1, [128, 192, 256, 320, 384, 448, 512]),
}


def main(argv: Optional[List[str]] = None) -> int:
    parser = make_parser(__doc__, 'benchmark_attention')
    add = parser.add_argument
    add('--arch', choices=['b0', 'b1', 'b2'], default='b0', help='default: %(default)s')
    add('--attentions', nargs='+', choices=ATTENTIONS, default=ATTENTIONS, help='default: all')
    args = parser.parse_args(argv)
    names = [f'linglo_{args.arch}_{attention}' for attention in args.attentions]
    args.models = args.models or [name.removesuffix('_key_only') for name in names]
    batch_size, sizes = DEFAULTS[args.device]
    args.batch_size, args.sizes = args.batch_size or batch_size, args.sizes or sizes
    args.sweep = True
    with explain_errors():
        measure(args)
    return 0


if __name__ == '__main__':
    run(main)

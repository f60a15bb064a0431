# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Measure latency and peak memory of LinGlo with key-only and with dot-product attention, by input size.

This is the paper's Fig. 4, which was measured with batch 16 on a V100 with 32 GB. The tool is a
preset of benchmark_backbones.py --sizes, and takes its options. PyTorch computes dot-product
attention in a fused kernel, which never holds the N x N matrix of all pairs in memory. A third
curve shows the same attention with this matrix.
"""

from typing import List, Optional

from benchmark_backbones import make_parser, measure

from mmlinglo.analysis.report import explain_errors
from mmlinglo.utils.cli import run

MODELS = ['linglo_b0', 'linglo_b0_dot_product', 'linglo_b0_dot_product_materialised']
# Device: batch size and input sizes that take a few minutes.
DEFAULTS = {
    'cuda': (16, [224, 320, 416, 512, 608, 704, 800]),
    'cpu': (1, [128, 192, 256, 320, 384, 448, 512]),
}


def main(argv: Optional[List[str]] = None) -> int:
    parser = make_parser(__doc__, 'benchmark_attention')
    parser.set_defaults(models=MODELS)
    args = parser.parse_args(argv)
    batch_size, sizes = DEFAULTS[args.device]
    args.batch_size = args.batch_size or batch_size
    args.sizes = args.sizes or (None if args.shape else sizes)
    with explain_errors():
        measure(args)
    return 0


if __name__ == '__main__':
    run(main)

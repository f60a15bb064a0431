# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Measure how far the padding of a batch moves an image's features, and what LinGlo's mask_padding costs.

Untrained backbones with several seeds see a random image alone, and with zeros on its right, as in a
batch with a wider image. The tool measures the cost on a batch of two images of COCO's size, the second
of which is padded.
"""

from itertools import product
from typing import Dict, List, Optional, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlinglo.analysis import report
from mmlinglo.analysis.benchmark import make_step, time_steps
from mmlinglo.analysis.complexity import pad
from mmlinglo.analysis.peers import ALL, STAGES, Plain, build_backbone
from mmlinglo.utils.cli import run

BACKBONES = ('linglo_b0', 'pvt_v2_b0', 'linglo_b0_mask_padding')
SIZE = 320  # of the image, in pixels, a multiple of 64
SIZES = [(800, 1333), (800, 1066)]


@torch.inference_mode()
def measure_shift(model: nn.Module, image: Tensor, padding: int) -> float:
    """Measure how far padding on its right moves the features of an image's left half.

    Args:
        model: Backbone in evaluation mode; its last map has stride 32.
        image: (C, H, W), W a multiple of 64.
        padding: Width of the zeros in pixels.

    Returns:
        Norm of the difference over the norm of the features without padding, in
        the left half of the last map.
    """
    height, width = image.shape[1:]
    size = [[(height, width)]] if isinstance(model, Plain) else []  # LinGlo is told it
    half = width // 64  # columns of stride 32
    alone, padded = (
        model(F.pad(image[None], (0, pixels)), *size)[-1][..., :half] for pixels in (0, padding)
    )
    return float((padded - alone).norm() / alone.norm())


def measure_shifts(paddings: Sequence[int], seeds: int) -> List[dict]:
    """Measure the shifts of all backbones in percent: mean and extremes over the seeds."""
    shifts = []
    for name, seed in product(BACKBONES, range(seeds)):
        image = torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        model = build_backbone(name, (SIZE, SIZE), STAGES)
        shifts += [(name, width, 100 * measure_shift(model, image, width)) for width in paddings]
    table = pd.DataFrame(shifts, columns=['backbone', 'padding', 'shift'])
    found = table.groupby(['backbone', 'padding'], sort=False)['shift']
    found = found.agg(shift='mean', shift_min='min', shift_max='max').reset_index()
    return found.to_dict('records')


def measure_cost(device: str, rounds: int) -> Dict[str, object]:
    """Time LinGlo-b0 deployed, with and without mask_padding, in milliseconds a batch."""
    shape = pad([max(lengths) for lengths in zip(*SIZES)])
    images = torch.randn(len(SIZES), 3, *shape, device=device)
    steps = {}
    for name in (BACKBONES[0], BACKBONES[2]):
        model = build_backbone(name, shape, STAGES, True).to(device)
        steps[name] = make_step(model, images, SIZES, train_step=False)
    plain, masked = (median for _, median, _ in time_steps(steps, rounds, warmup=1).values())
    return dict(work='inference', plain_ms=plain, masked_ms=masked, ratio=masked / plain)


def main(argv: Optional[List[str]] = None) -> int:
    parser = report.make_parser(__doc__, 'measure_padding', rounds=5)
    add = parser.add_argument
    text = f'widths in pixels, for an image of {SIZE} x {SIZE}; default: %(default)s'
    add('--paddings', nargs='+', type=report.at_least(0), default=[128, 320], help=text)
    add('--seeds', type=report.at_least(1), default=5, help='number of seeds; default: %(default)s')
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    with report.explain_errors():
        shifts = measure_shifts(args.paddings, args.seeds)
        cost = measure_cost(args.device, args.rounds)
    source = report.provenance(args.device, seeds=args.seeds, rounds=args.rounds)
    report.write_report(args.out, [*shifts, cost], source)
    print('How far features move in percent, by pixels of padding\n')
    shifts = [dict(row, backbone=ALL[row['backbone']].label) for row in shifts]
    print(report.format_table(shifts, ('backbone', 'padding', 'shift', 'shift_min', 'shift_max')))
    print('\nLinGlo-b0, 800 x 1333 and 800 x 1066 in a batch, without and with mask_padding\n')
    print(report.format_table([cost], ('work', 'plain_ms', 'masked_ms', 'ratio')))
    print(f'\n{args.out}.json, .csv')
    return 0


if __name__ == '__main__':
    run(main)

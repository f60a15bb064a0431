# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Train the paper's ablations and two other backbones on CIFAR-10, and compare their order with the paper's.

The trainings run one after another. If you interrupt the campaign, start it again with the same arguments. It
skips finished trainings, and continues an unfinished one from its last validated epoch, with other random
numbers than without the interruption. After each training, the tool writes the table (<out>.json, .csv, .md),
the orders (<out>_orders.json, .csv) and the curves (<out>.png) again.

You can run the same command several times at once to share the work. Give each process its own GPU
(CUDA_VISIBLE_DEVICES) or its own core (OMP_NUM_THREADS=1).
"""

import argparse
import copy
import itertools
import signal
import sys
from pathlib import Path
from typing import List, Optional

import torch

from mmlinglo.analysis import ablations, campaign
from mmlinglo.analysis.report import explain_errors, provenance
from mmlinglo.utils.cli import UsageError, run

ROOT = Path(__file__).resolve().parents[2]


def main(argv: Optional[List[str]] = None) -> int:
    parser, rows = campaign.campaign_parser(__doc__, 'ablations', [0, 1]), list(ablations.ROWS)
    parser.add_argument('--rows', nargs='+', choices=rows, default=rows, help='default: all')
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('error: terminated'))
    with explain_errors():
        failed = run_campaign(parser.parse_args(argv))
    if failed:
        raise UsageError(f'{len(failed)} trainings failed: {", ".join(failed)}')
    return 0


def run_campaign(args: argparse.Namespace) -> List[str]:
    """Run the unfinished trainings. Return the work dirs of those that failed."""
    by_row = {row: campaign.make_config(ROOT, row, args) for row in args.rows}
    cfg = by_row[args.rows[0]]
    images = campaign.count_images(by_row.values(), args.fraction, args.test_fraction)
    params_m = {row: ablations.count_parameters(cfg) for row, cfg in by_row.items()}
    configs = {}
    for seed, row in itertools.product(args.seeds, args.rows):
        configs[Path(args.work_dir, row, f'seed{seed}.py')] = settings = copy.deepcopy(by_row[row])
        settings.randomness = dict(seed=seed)

    def write_results() -> str:
        settings = dict(epochs=cfg.train_cfg.max_epochs, batch_size=cfg.train_dataloader.batch_size)
        heading = 'CIFAR-10: {train} Training and {test} Test Images'.format(**images)
        heading += ', {epochs} Epochs, Batches of {batch_size}'.format(**settings)
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
        source = provenance(device, **settings, images=images, seeds=args.seeds)
        runs = campaign.read_runs(configs)
        return ablations.write_results(args.out, runs, params_m, heading, source)

    failed = []
    for path, how in campaign.train_all(ROOT, configs):
        if how == 'failed':
            failed.append(str(path.with_suffix('')))
        elif not how:
            write_results()
    print(f'\n{write_results()}\n')
    print(f'{args.out}.md, .json, .csv, .png and {args.out}_orders.json, .csv')
    return failed


if __name__ == '__main__':
    run(main)

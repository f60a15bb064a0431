# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Make all measurements that need a GPU, the most important first: see tools/gpu_day.sh."""

import argparse
import os
import re
import signal
import sys
from pathlib import Path
from typing import List, Optional

import torch

from mmlinglo.analysis import gpu_day
from mmlinglo.utils.cli import UsageError, run

ROOT = Path(__file__).resolve().parents[2]


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    text = 'time for all steps together; default: %(default)s'
    add('--minutes', type=float, default=25, help=text)
    add('--resume', action='store_true', help='continue: skip the steps that are done')
    add('--rehearse', action='store_true', help='run every step at toy size, on a CPU')
    add('--steps', nargs='+', metavar='NAME', help='run only these steps; default: all')
    text = 'folder for the results; default: docs/results/gpu_<name of the GPU>/'
    add('--out', type=Path, help=text)
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('error: terminated'))
    args = parse_args(argv)
    if not args.minutes > 0:
        raise UsageError(f'--minutes must be above 0, got {args.minutes}')
    if args.rehearse:
        os.environ['CUDA_VISIBLE_DEVICES'] = ''
    elif not torch.cuda.is_available():
        raise UsageError('PyTorch finds no GPU here: use --rehearse to try all steps on a CPU')
    name = 'rehearsal' if args.rehearse else torch.cuda.get_device_name()
    folder = ROOT / ('work_dirs' if args.rehearse else 'docs/results')
    out = args.out or folder / f'gpu_{re.sub("[^a-z0-9]+", "_", name.lower())}'
    out = Path(os.path.abspath(out))
    os.chdir(ROOT)
    out = out.relative_to(ROOT) if ROOT in out.parents else out  # hides the folders of this machine
    if (out / 'steps.json').exists() and not args.resume:
        raise UsageError(f'{out} has results already: give --resume, or another --out')
    out.mkdir(parents=True, exist_ok=True)
    steps = gpu_day.plan(out, args.rehearse)
    names = [step.name for step in steps]
    unknown = sorted(set(args.steps or ()) - set(names))
    if unknown:
        raise UsageError(f'no step {", ".join(unknown)}; there are {", ".join(names)}')
    steps = [step for step in steps if not args.steps or step.name in args.steps]
    failed = []
    for step, outcome in gpu_day.run_steps(ROOT, out, steps, args.minutes, args.resume):
        print(f'{step.title}: {outcome["status"]} {outcome["reason"]}', flush=True)
        failed += [step.name] if outcome['status'] == 'failed' else []
    print(f'{out}/summary.md')
    if failed:
        raise UsageError(f'failed: {", ".join(failed)}; see {out}/')
    return 0


if __name__ == '__main__':
    run(main)

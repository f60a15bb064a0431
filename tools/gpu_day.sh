#!/usr/bin/env bash
# bash tools/gpu_day.sh [--minutes 25] [--resume] [--rehearse] [--steps NAME...] [--out FOLDER]
# On a machine with a GPU: environment, correctness, speed, figure 4, training steps, quickstart and the CIFAR-10
# campaign, in the order of their worth, each with its own time limit. What lacks packages or data is skipped, with
# the reason. Results and summary.md are in docs/results/gpu_<name of the GPU>/; --resume goes on after an interruption.
# --rehearse runs every step at toy size on a CPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/common.sh
exec "$PYTHON" tools/analysis_tools/run_gpu_day.py "$@"

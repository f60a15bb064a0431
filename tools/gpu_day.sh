#!/usr/bin/env bash
# bash tools/gpu_day.sh [--minutes 25] [--resume] [--rehearse] [--steps NAME...] [--out FOLDER]
# Makes all measurements that need a GPU, the most important first: environment, correctness, speed, figure 4, training
# steps, quickstart and the CIFAR-10 campaign. Each step has its own time limit. A step that lacks packages or data is
# skipped, with the reason. Results and summary.md go to docs/results/gpu_<name of the GPU>/.
#   --resume    continue after an interruption
#   --rehearse  run every step at toy size on a CPU
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/common.sh
exec "$PYTHON" tools/analysis_tools/run_gpu_day.py "$@"

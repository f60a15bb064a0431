#!/usr/bin/env bash
# bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [test.py options]
# GPUS is the number of processes on this node: one per GPU, or any number on a machine without GPUs.
# Options: python tools/test.py --help
# Several nodes: NNODES, NODE_RANK, MASTER_ADDR and PORT, the same command on each with its own NODE_RANK.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -ge 3 ] || usage
dist_launch "$3" "$ROOT/tools/test.py" "$1" "$2" "${@:4}"

#!/usr/bin/env bash
# bash tools/dist_train.sh CONFIG GPUS [train.py options]
# GPUS is the number of processes on this node: one per GPU. On a machine without GPUs, it can be any number.
# Options: python tools/train.py --help
# Several nodes: set NNODES, NODE_RANK, MASTER_ADDR and PORT. Run the same command on each node, with its own NODE_RANK.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -ge 2 ] || usage
dist_launch "$2" "$ROOT/tools/train.py" "$1" "${@:3}"

#!/usr/bin/env bash
# bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [test.py options]
# GPUS is the number of processes on this node: one per GPU. On a machine without GPUs, it can be any number.
# Options: python tools/test.py --help
# Several nodes: set NNODES, NODE_RANK, MASTER_ADDR and PORT. Run the same command on each node, with its own NODE_RANK.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -ge 3 ] || usage
dist_launch "$3" "$ROOT/tools/test.py" "$1" "$2" "${@:4}"

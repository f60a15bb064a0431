#!/usr/bin/env bash
# bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [test.py options]
# GPUS is the number of processes on this node: one per GPU, or any number on a machine without GPUs.
# Several nodes: NNODES, NODE_RANK, MASTER_ADDR and PORT, the same command on each with its own NODE_RANK.
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n '2,4s/^# //p' "$0" >&2
    exit 2
fi
CONFIG=$1
CHECKPOINT=$2
GPUS=$3
shift 3
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
if [ "${NNODES:-1}" = 1 ] && [ -z "${PORT:-}" ]; then
    RENDEZVOUS=(--standalone) # any free port
else
    RENDEZVOUS=(--master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${PORT:-29500}")
fi
exec "$PYTHON" -m torch.distributed.run --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" \
    --nproc_per_node "$GPUS" "${RENDEZVOUS[@]}" \
    "$ROOT/tools/test.py" "$CONFIG" "$CHECKPOINT" --launcher pytorch "$@"

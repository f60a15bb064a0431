#!/usr/bin/env bash
# bash tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [test.py options]
# Options: python tools/test.py --help
# You can set the environment variables GPUS (default 8), GPUS_PER_NODE (8), CPUS_PER_TASK (5) and SRUN_ARGS.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -ge 4 ] || usage
slurm_launch "$1" "$2" "$ROOT/tools/test.py" "$3" "$4" "${@:5}"

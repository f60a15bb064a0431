#!/usr/bin/env bash
# bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [train.py options]
# Options: python tools/train.py --help
# You can set the environment variables GPUS (default 8), GPUS_PER_NODE (8), CPUS_PER_TASK (5) and SRUN_ARGS.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -ge 4 ] || usage
slurm_launch "$1" "$2" "$ROOT/tools/train.py" "$3" --work-dir "$4" "${@:5}"

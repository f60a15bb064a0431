# The scripts in this folder source this file. It sets what stack.sh sets, and PYTHON: the value that you gave, else the
# Python of the environment that setup_env.sh made, else `python`.
source "$(dirname "${BASH_SOURCE[0]}")/stack.sh"
if [ -z "${PYTHON:-}" ]; then
    if [ -e "$VENV/.mmlinglo-unfinished" ]; then
        echo "error: $VENV is not complete. Run 'bash tools/setup_env.sh', or name another Python with PYTHON=..." >&2
        exit 1
    fi
    PYTHON=python
    if [ -x "$VENV/bin/python" ]; then PYTHON=$VENV/bin/python; fi
fi
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}

# dist_launch GPUS SCRIPT ARGUMENTS...: start the processes of this node with torchrun.
dist_launch() {
    local gpus=$1 rendezvous=(--standalone) # uses any free port
    shift
    [[ $gpus =~ ^[1-9][0-9]*$ ]] || usage
    if [ "${NNODES:-1}" != 1 ] || [ -n "${PORT:-}" ]; then
        rendezvous=(--master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${PORT:-29500}")
    fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun sets the same, but with a warning
    exec "$PYTHON" -m torch.distributed.run --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" \
        --nproc_per_node "$gpus" "${rendezvous[@]}" "$@" --launcher pytorch
}

# slurm_launch PARTITION JOB_NAME SCRIPT ARGUMENTS...: start the processes of all nodes with srun.
slurm_launch() {
    local partition=$1 job_name=$2 gpus_per_node=${GPUS_PER_NODE:-8}
    shift 2
    # shellcheck disable=SC2086 # SRUN_ARGS holds several words
    exec srun -p "$partition" --job-name="$job_name" --gres="gpu:$gpus_per_node" \
        --ntasks="${GPUS:-8}" --ntasks-per-node="$gpus_per_node" \
        --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 \
        ${SRUN_ARGS:-} "$PYTHON" -u "$@" --launcher slurm
}

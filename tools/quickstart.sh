#!/usr/bin/env bash
# bash tools/quickstart.sh [detection|segmentation|classification]
# Sets up the environment if it is missing, makes a small synthetic data set, trains LinGlo-b0 on it, evaluates it, draws
# its predictions on unseen pictures and makes a report page. You find the data in data/shapes/ and everything else in
# work_dirs/quickstart-<task>/. If this folder exists, the script uses work_dirs/quickstart-<task>-2/ and so on.
# Variables: those of tools/setup_env.sh. PYTHON is the Python to use instead of .venv's; then nothing is set up.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/stack.sh
[ $# -le 1 ] || usage
TASK=${1:-detection}
case $TASK in
detection)
    CONFIG=configs/quickstart/retinanet_linglo-b0_fpn_2xb4-3e_shapes.py
    PAPER=configs/coco/retinanet_linglo-b1_fpn_1x_coco.py
    DATA='COCO in data/coco'
    ;;
segmentation)
    CONFIG=configs/quickstart/fpn_linglo-b0_2xb4-360_shapes-160x160.py
    PAPER=configs/ade20k/fpn_linglo-b1_8xb4-40k_ade20k-512x512.py
    DATA='ADE20K in data/ade'
    ;;
classification)
    CONFIG=configs/quickstart/linglo-b0_2xb16-8e_shapes.py
    PAPER=configs/imagenet/linglo-b1_8xb128_in1k.py
    DATA='ImageNet in data/imagenet'
    ;;
*)
    usage
    ;;
esac
WORK_DIR=work_dirs/quickstart-$TASK
for ((i = 2; ; i++)); do # somebody may have gone on with an earlier training
    [ -e "$WORK_DIR" ] || break
    WORK_DIR=work_dirs/quickstart-$TASK-$i
done

say() { echo "[quickstart] $*"; }

if [ -z "${PYTHON:-}" ]; then bash tools/setup_env.sh; fi
source tools/common.sh

start=$SECONDS
"$PYTHON" tools/misc/make_shapes.py data/shapes
gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
processes=$((gpus > 0 ? gpus : 2))
say "training $CONFIG in $processes processes on $([ "$gpus" -gt 0 ] && echo "$gpus GPUs" || echo 'the CPU')"
bash tools/dist_train.sh "$CONFIG" "$processes" --work-dir "$WORK_DIR"
CHECKPOINT=$(cat "$WORK_DIR/last_checkpoint")

say "evaluating $CHECKPOINT"
"$PYTHON" tools/test.py "$CONFIG" "$CHECKPOINT" --work-dir "$WORK_DIR/test"
say 'drawing predictions on unseen pictures'
"$PYTHON" tools/infer.py "$CONFIG" "$CHECKPOINT" data/shapes/demo --out-dir "$WORK_DIR" --score-thr 0.5
say 'making a page of curves, metrics and predictions'
PAGE=$WORK_DIR/report.html
"$PYTHON" tools/analysis_tools/report.py "$WORK_DIR" --score-thr 0.5 || PAGE='not made, see above'

METRICS=$(find "$WORK_DIR/test" -name '*.json' | sort | tail -n 1)
echo
say "done in $((SECONDS - start)) s"
say "metrics on the validation scenes: $(cat "$METRICS")"
say "page with curves and predictions: $PAGE"
say "predictions on unseen images:     $WORK_DIR/vis/"
say "next, with $DATA:  bash tools/dist_train.sh $PAPER 8"

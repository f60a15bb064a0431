#!/usr/bin/env bash
# bash tools/setup_env.sh
# Makes .venv with the pinned stack, or completes it after an interruption; does nothing if it is complete.
# mmcv is compiled from source once for each torch, Python and CUDA version and kept in a wheel cache:
#   MMLINGLO_STACK        onedl (default) or openmmlab: the maintained forks or the original OpenMMLab releases
#   MMLINGLO_VENV         the environment's folder (default: .venv, or .venv-openmmlab, in the checkout)
#   MMLINGLO_WHEEL_CACHE  the cache (default: ~/.cache/mmlinglo/wheels)
#   MMCV_OPS=cpu          compile no CUDA operators on a machine with GPUs (no detection on the GPU then)
#   PYTHON                the Python to make the environment from (default: python3.11, or 3.10, 3.12, 3.13)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/stack.sh"
CACHE=${MMLINGLO_WHEEL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mmlinglo/wheels}
# mmcv's metadata needs setuptools >= 77, the original OpenMMLab releases need < 80
BUILD_TOOLS=('setuptools>=77.0.3,<80' wheel ninja psutil)

say() { echo "[setup_env] $*"; }
fail() { echo "[setup_env] error: $*" >&2; exit 1; }

cd "$ROOT"
# Changes whenever one of these files does, and with the folder, which an environment cannot leave.
stamp=$(cat tools/setup_env.sh tools/stack.sh setup.py requirements/*.txt <(echo "$VENV") | sha256sum | cut -d' ' -f1)
if [ "$(cat "$VENV/.mmlinglo-ready" 2>/dev/null)" = "$stamp" ]; then
    say "$VENV is ready"
    exit 0
fi

find_python() {
    local name names
    # shellcheck disable=SC2086 # several versions
    names=$(printf 'python%s ' $PYTHONS)
    for name in ${PYTHON:-$names python3}; do
        if "$name" -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] not in sys.argv[1].split())' "$PYTHONS" \
            2>/dev/null; then
            echo "$name"
            return
        fi
    done
    fail "none of the Pythons $PYTHONS found: install python3.11, or name one with PYTHON=..."
}
# pip takes a package for installed whose files are only half there, so an interrupted environment is made anew.
unfinished=$VENV/.mmlinglo-unfinished
if [ -e "$unfinished" ] || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    base=$(find_python)
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$base has no venv module: on Debian or Ubuntu, apt-get install python3-venv"
    say "making $VENV with $("$base" --version)"
    "$base" -m venv --clear "$VENV"
fi
rm -f "$VENV/.mmlinglo-ready"
touch "$unfinished"
python=$VENV/bin/python
pip=("$python" -m pip --disable-pip-version-check)

say "installing torch $TORCH and torchvision $TORCHVISION (2 minutes, 5 GB)"
"${pip[@]}" install -q "torch==$TORCH" "torchvision==$TORCHVISION" "${BUILD_TOOLS[@]}"

mmcv=$(grep "^$MMCV==" "$MMINSTALL")
device=cpu
if [ "${MMCV_OPS:-}" != cpu ]; then
    device=$("$python" -c 'import torch; c = torch.cuda.is_available(); print("cu" + torch.version.cuda if c else "cpu")')
fi
key=torch$TORCH-$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')-$device
wheel_name=${MMCV//-/_}-${mmcv#*==}-*.whl
# shellcheck disable=SC2086 # a pattern
wheel=$(compgen -G "$CACHE/$key/"$wheel_name | head -n 1 || true)
if [ -z "$wheel" ]; then
    command -v g++ >/dev/null || fail "g++ not found: on Debian or Ubuntu, apt-get install g++"
    "$python" -c 'import os, sysconfig as s; open(os.path.join(s.get_paths()["include"], "Python.h"))' 2>/dev/null ||
        fail "the headers of $("$python" --version) are missing: on Debian or Ubuntu, apt-get install python3-dev"
    if [ "$device" != cpu ]; then
        nvcc=$(nvcc --version 2>/dev/null | sed -n 's/.*release \([0-9]*\).*/\1/p')
        major=${device#cu}
        [ "$nvcc" = "${major%%.*}" ] ||
            fail "this machine has a GPU; to compile mmcv's operators for it, nvcc of CUDA ${major%%.*} must be on PATH (found: ${nvcc:-none}). MMCV_OPS=cpu does without them: classification and segmentation run on the GPU, detection does not"
    fi
    say "compiling $mmcv for $key (once; 16 minutes on 2 cores)"
    mkdir -p "$CACHE/$key"
    build=$(mktemp -d "$CACHE/$key/.build-XXXXXX")
    trap 'rm -rf "$build"' EXIT
    # --no-build-isolation: without torch in sight mmcv silently leaves its operators out.
    # --no-cache-dir: pip's own cache would serve a wheel that was built against another torch.
    ops_on_cpu=()
    if [ "$device" = cpu ]; then ops_on_cpu=(CUDA_VISIBLE_DEVICES=-1 FORCE_CUDA=0); fi
    env MMCV_WITH_OPS=1 "${ops_on_cpu[@]}" "${pip[@]}" wheel --no-cache-dir --no-build-isolation \
        --no-deps -w "$build" "$mmcv" >"$CACHE/$key/build.log" 2>&1 ||
        fail "compiling $mmcv failed, see $CACHE/$key/build.log"
    # shellcheck disable=SC2086 # a pattern
    wheel=$CACHE/$key/$(basename "$build"/$wheel_name)
    mv "$build/$(basename "$wheel")" "$wheel"
fi
say "installing $(basename "$wheel"), the toolboxes and the test tools (2 minutes)"
# A wheel of the same version may be there from another torch.
"${pip[@]}" install -q --no-deps --force-reinstall "$wheel"
"${pip[@]}" install -q "torch==$TORCH" "torchvision==$TORCHVISION" "${BUILD_TOOLS[@]}" \
    -r "$MMINSTALL" -r requirements/tests.txt -r requirements/docs.txt -r requirements/analysis.txt
"${pip[@]}" install -q --no-deps --no-build-isolation -e .

# Two of the packages bring opencv-python, which needs libGL; a server without a screen may not have it.
if ! "$python" -c 'import cv2' 2>/dev/null; then
    version=$("$python" -c 'from importlib.metadata import version; print(version("opencv-python-headless"))')
    "${pip[@]}" install -q --no-deps --force-reinstall "opencv-python-headless==$version"
fi
"$python" -W ignore - <<'CHECK' || fail "the environment in $VENV does not work, see above"
import mmcv._ext, mmdet.apis, mmpretrain.apis, mmseg.apis, mmlinglo, torch, torchvision
print(f'[setup_env] torch {torch.__version__}, mmcv {mmcv.__version__} with operators, '
      f'mmdet {mmdet.__version__}, mmseg {mmseg.__version__}, mmpretrain {mmpretrain.__version__}, '
      f'mmlinglo {mmlinglo.__version__}')
CHECK
echo "$stamp" >"$VENV/.mmlinglo-ready"
rm "$unfinished"
say "$VENV is ready"

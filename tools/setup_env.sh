#!/usr/bin/env bash
# bash tools/setup_env.sh [--compile | --stand-in]
# Makes .venv with the tested versions, or completes it after an interruption. If it is complete, nothing happens.
#
# Detection needs some of mmcv's operators. They come from the first of these:
#   1. a wheel of mmcv in the wheel cache, compiled earlier
#   2. a wheel from the page or folder that MMCV_INDEX names; it must fit this Python, torch and CUDA
#   3. torchvision, through a stand-in that needs no compiler (mmlinglo/mmcv_ops.py)
# Options:
#   --compile   compile mmcv instead of 2 and 3, once for each torch, Python and CUDA. It needs g++ and 16 minutes on 2 cores;
#               for GPUs, it needs nvcc, too, and more than an hour
#   --stand-in  use the stand-in even if there is a wheel
#   -h, --help  print this
# Variables:
#   MMLINGLO_STACK        onedl (default) or openmmlab: the maintained forks or the original OpenMMLab releases
#   MMLINGLO_TORCH        another version of torch than the tested one, such as 2.11.0
#   MMLINGLO_VENV         the environment's folder (default: .venv, or .venv-openmmlab, in the checkout)
#   MMLINGLO_WHEEL_CACHE  the wheel cache (default: ~/.cache/mmlinglo/wheels)
#   MMCV_INDEX            page or folder with wheels of mmcv, for pip's --find-links
#   MMCV_OPS=cpu|cuda     with --compile: the device to compile for; default: cuda on a machine with GPUs, else cpu. On a
#                         machine without a GPU, cuda also needs TORCH_CUDA_ARCH_LIST, such as 9.0 for an H100
#   PYTHON                the Python to make the environment from (default: python3.11, or 3.10, 3.12, 3.13)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/stack.sh"
CACHE=${MMLINGLO_WHEEL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mmlinglo/wheels}
# mmcv's metadata needs setuptools >= 77, and the original OpenMMLab releases need < 80
BUILD_TOOLS=('setuptools>=77.0.3,<80' wheel ninja psutil)
READY=$VENV/.mmlinglo-ready UNFINISHED=$VENV/.mmlinglo-unfinished

say() { printf '[setup_env %3d s] %s\n' "$SECONDS" "$*"; }
fail() { echo "[setup_env] error: $*" >&2; exit 1; }
pip() { "$python" -m pip --disable-pip-version-check "$@"; }
pin() { sed -n "s/^$1==//p" "${@:2}"; }

[[ ${MMCV_OPS:-cpu} =~ ^(cpu|cuda)$ ]] || fail "MMCV_OPS is '$MMCV_OPS'; it must be cpu or cuda"
case $#:${1:-} in
0: | 1:--compile | 1:--stand-in) want=${1:-} ;;
*) usage ;;
esac
cd "$ROOT"
TORCH=$(pin torch "$TORCH_PIN") TORCHVISION=$(pin torchvision "$TORCH_PIN")
if [ -n "${MMLINGLO_TORCH:-}" ]; then
    [[ $MMLINGLO_TORCH =~ ^2\.([0-9]+)\.([0-9]+)$ ]] ||
        fail "MMLINGLO_TORCH is '$MMLINGLO_TORCH'; it must be a version such as $TORCH"
    TORCH=$MMLINGLO_TORCH TORCHVISION=0.$((BASH_REMATCH[1] + 15)).${BASH_REMATCH[2]}
fi
mmcv=$MMCV==$(pin "$MMCV" "${STACK_PINS[@]}")
python=$VENV/bin/python

has_compiled_mmcv() { compgen -G "$VENV/lib/python*/site-packages/mmcv/_ext.*.so" >/dev/null; }

# The stamp depends on these files, the version of torch, and the folder, because an environment cannot be moved.
stamp=$(cat tools/setup_env.sh tools/stack.sh setup.py requirements/*.txt <(echo "$VENV $TORCH") | sha256sum | cut -d' ' -f1)
is_ready=
if [ "$(cat "$READY" 2>/dev/null)" = "$stamp" ]; then
    is_ready=1
    case $want in
    --compile) has_compiled_mmcv && want= ;;
    --stand-in) has_compiled_mmcv || want= ;;
    esac
    if [ -z "$want" ]; then
        say "$VENV is ready"
        exit 0
    fi
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

make_venv() {
    local base
    base=$(find_python)
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$base has no venv module: on Debian or Ubuntu, apt-get install python3-venv"
    if [ -n "$(ls -A "$VENV" 2>/dev/null)" ] && [ ! -e "$VENV/pyvenv.cfg" ] && [ ! -e "$UNFINISHED" ]; then
        fail "$VENV is not an environment and not empty: name another folder with MMLINGLO_VENV"
    fi
    say "making $VENV with $("$base" --version)"
    rm -rf "$VENV"
    mkdir -p "$VENV"
    touch "$UNFINISHED" # first of all, so that nothing uses a half-made environment
    "$base" -m venv "$VENV"
}

# torch's build without CUDA is a tenth of the size. PyPI does not have it, but another index that pip uses may.
install_torch() {
    say "installing torch $TORCH and torchvision $TORCHVISION"
    if [ "${MMCV_OPS:-}" != cuda ] && ! nvidia-smi -L >/dev/null 2>&1; then
        if pip install -q "torch==$TORCH+cpu" "torchvision==$TORCHVISION+cpu" "${BUILD_TOOLS[@]}" 2>/dev/null; then return; fi
        compgen -G "$VENV/lib/python*/site-packages/torch" >/dev/null || say 'This is the build for GPUs (5 GB), since your package index has no build for CPUs. If you can reach it,' \
            'PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu has one (1 GB)'
    fi
    pip install -q "torch==$TORCH" "torchvision==$TORCHVISION" "${BUILD_TOOLS[@]}"
}

compile_mmcv() { # into the folder $1
    local nvcc major ops=() duration='16 minutes on 2 cores'
    command -v g++ >/dev/null || fail "g++ not found: on Debian or Ubuntu, apt-get install g++"
    "$python" -c 'import os, sysconfig as s; open(os.path.join(s.get_paths()["include"], "Python.h"))' 2>/dev/null ||
        fail "the headers of $("$python" --version) are missing: on Debian or Ubuntu, apt-get install python3-dev"
    if [ "$device" = cpu ]; then
        ops=(CUDA_VISIBLE_DEVICES=-1 FORCE_CUDA=0)
    else
        ops=(FORCE_CUDA=1) duration='more than an hour on 2 cores'
        nvcc=$(nvcc --version 2>/dev/null | sed -n 's/.*release \([0-9]*\).*/\1/p')
        major=${device#cu}
        [ "$nvcc" = "${major%%.*}" ] ||
            fail "to compile mmcv's operators for a GPU, nvcc of CUDA ${major%%.*} must be on PATH (found: ${nvcc:-none}). Without --compile, torchvision's operators run on the GPU"
        [ -n "${TORCH_CUDA_ARCH_LIST:-}" ] || nvidia-smi -L >/dev/null 2>&1 ||
            fail "there is no GPU here: name the kind to compile for, such as TORCH_CUDA_ARCH_LIST=9.0 for an H100"
    fi
    say "compiling $mmcv for $key (once; $duration)"
    # --no-build-isolation: a build that cannot see torch silently leaves the operators out.
    # --no-cache-dir: pip's own cache could hold a wheel that was built against another torch.
    env "${ops[@]}" "$python" -m pip wheel --no-cache-dir --no-build-isolation --no-deps -w "$1" "$mmcv" \
        >"$CACHE/$key/build.log" 2>&1 || fail "compiling $mmcv failed, see $CACHE/$key/build.log"
}

# Set `wheel` to a wheel with compiled operators in the cache, or to nothing to use the stand-in.
find_wheel() {
    local name=${MMCV//-/_}-${mmcv#*==}-*.whl new
    wheel=
    if [ "$want" = --stand-in ]; then return; fi
    # shellcheck disable=SC2086 # a pattern
    wheel=$(compgen -G "$CACHE/$key/"$name | head -n 1 || true)
    if [ -n "$wheel" ] || [ "$want$MMCV_INDEX" = '' ]; then return; fi
    mkdir -p "$CACHE/$key" "$scratch/new"
    new=$scratch/new
    if [ "$want" = --compile ]; then
        compile_mmcv "$new"
    elif ! pip download -q --no-cache-dir --no-index --find-links "$MMCV_INDEX" --no-deps --only-binary :all: \
        -d "$new" "$mmcv"; then
        say "$MMCV_INDEX has no wheel of $mmcv for this Python"
        return
    elif ! loads "$new"/*.whl; then
        say "the wheel in $MMCV_INDEX does not fit torch $TORCH"
        return
    fi
    wheel=$CACHE/$key/$(basename "$new"/*.whl)
    cp "$new"/*.whl "$wheel.part"
    mv "$wheel.part" "$wheel"
}

# Whether the operators in a wheel were compiled for the installed torch.
loads() {
    "$python" - "$1" <<'LOAD' 2>/dev/null
import importlib.util, sys, tempfile, zipfile, torch
with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(sys.argv[1]) as archive:
    (name,) = [name for name in archive.namelist() if name.startswith('mmcv/_ext.')]
    spec = importlib.util.spec_from_file_location('_ext', archive.extract(name, folder))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.nms
LOAD
}

install_mmcv() {
    if [ -n "$wheel" ]; then
        say "installing $(basename "$wheel") with compiled operators"
        pip install -q --no-deps --force-reinstall "$wheel" # the same version may be installed without them
        return
    fi
    say "installing $mmcv without compiled operators: torchvision's take their place"
    echo 'raise ModuleNotFoundError("hidden, so that mmcv does not compile")' >"$scratch/torch.py"
    PYTHONPATH=$scratch pip install -q --no-cache-dir --no-build-isolation --no-deps --force-reinstall "$mmcv"
}

install_toolboxes() {
    say 'installing the toolboxes and the test tools'
    local requirements=() file
    for file in "${STACK_PINS[@]}" requirements/{runtime,tests,docs,analysis}.txt; do requirements+=(-r "$file"); done
    pip install -q "torch==$TORCH" "torchvision==$TORCHVISION" "${BUILD_TOOLS[@]}" "${requirements[@]}"
    pip install -q --no-deps --no-build-isolation -e .
    # Two of the packages install opencv-python, which needs libGL. A server without a screen may lack it.
    if ! "$python" -c 'import cv2' 2>/dev/null; then
        pip install -q --no-deps --force-reinstall \
            "opencv-python-headless==$("$python" -c 'from importlib.metadata import version as v; print(v("opencv-python-headless"))')"
    fi
}

# pip considers a package installed even if half of its files are missing, so make an interrupted environment again.
if [ -e "$UNFINISHED" ] || ! "$python" -m pip --version >/dev/null 2>&1; then make_venv; fi
if [ -z "$is_ready" ]; then
    rm -f "$READY"
    touch "$UNFINISHED"
    install_torch
fi
device=$("$python" - "${MMCV_OPS:-}" <<'DEVICE'
import sys, torch
on_gpu = sys.argv[1] == 'cuda' or (sys.argv[1] != 'cpu' and torch.cuda.is_available())
print(f'cu{torch.version.cuda}' if on_gpu else 'cpu')
DEVICE
)
[ "$device" != cuNone ] || fail "torch in $VENV was built without CUDA: remove the folder, and run this again"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
key=torch$TORCH-$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')-$device
MMCV_INDEX=${MMCV_INDEX:-}
find_wheel # if this fails, a ready environment stays as it is
rm -f "$READY"
touch "$UNFINISHED"
install_mmcv
if [ -z "$is_ready" ]; then install_toolboxes; fi
if [ -z "$wheel" ]; then "$python" -W ignore -c 'from mmlinglo import mmcv_ops; mmcv_ops.link()'; fi
"$python" -W ignore - <<'CHECK' || fail "the environment in $VENV does not work, see above"
import contextlib, io
with contextlib.redirect_stdout(io.StringIO()):  # mmdet tells of data sets that nobody asked for
    import mmcv._ext, mmdet.apis, mmpretrain.apis, mmseg.apis, mmlinglo, torch, torchvision
operators = 'torchvision' if mmcv._ext.__file__.endswith('.py') else 'its own'
print(f'torch {torch.__version__}, mmcv {mmcv.__version__} with {operators} operators, mmdet {mmdet.__version__}, '
      f'mmseg {mmseg.__version__}, mmpretrain {mmpretrain.__version__}, mmlinglo {mmlinglo.__version__}')
CHECK
echo "$stamp" >"$READY"
rm "$UNFINISHED"
say "$VENV is ready"

# To be sourced by the scripts beside it. Sets what depends on MMLINGLO_STACK:
#   onedl      the maintained forks, the default
#   openmmlab  the original OpenMMLab releases. Their mmengine cannot resume its own checkpoints with torch 2.6 or newer.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case ${MMLINGLO_STACK:-onedl} in
onedl)
    TORCH=2.11.0 TORCHVISION=0.26.0 PYTHONS='3.11 3.10 3.12 3.13' MMCV=onedl-mmcv
    MMINSTALL=$ROOT/requirements/mminstall.txt VENV=${MMLINGLO_VENV:-$ROOT/.venv}
    ;;
openmmlab)
    TORCH=2.5.1 TORCHVISION=0.20.1 PYTHONS='3.11 3.10 3.12' MMCV=mmcv
    MMINSTALL=$ROOT/requirements/mminstall_openmmlab.txt VENV=${MMLINGLO_VENV:-$ROOT/.venv-openmmlab}
    ;;
*)
    echo "error: MMLINGLO_STACK is '$MMLINGLO_STACK'; it can be onedl or openmmlab" >&2
    exit 2
    ;;
esac

# The scripts in this folder source this file. It answers --help, and sets what depends on MMLINGLO_STACK:
#   onedl      the maintained forks, the default
#   openmmlab  the original OpenMMLab releases. Their mmengine cannot resume its own checkpoints with torch 2.6 or newer.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Print the comment at the top of the script that sources this one.
describe() { sed -n '/^[^#]/q; /^#!/d; s/^# \{0,1\}//p' "$0"; }

# Print it after a mistake, and exit.
usage() {
    describe >&2
    exit 2
}

for argument in "$@"; do
    case $argument in
    -h | --help)
        describe
        exit 0
        ;;
    esac
done

case ${MMLINGLO_STACK:-onedl} in
onedl)
    PYTHONS='3.11 3.10 3.12 3.13' MMCV=onedl-mmcv VENV=${MMLINGLO_VENV:-$ROOT/.venv}
    TORCH_PIN=$ROOT/requirements/torch.txt
    STACK_PINS=("$ROOT"/requirements/{mminstall,det,cls,seg}.txt)
    ;;
openmmlab)
    PYTHONS='3.11 3.10 3.12' MMCV=mmcv VENV=${MMLINGLO_VENV:-$ROOT/.venv-openmmlab}
    TORCH_PIN=$ROOT/requirements/mminstall_openmmlab.txt
    STACK_PINS=("$TORCH_PIN")
    ;;
*)
    echo "error: MMLINGLO_STACK is '$MMLINGLO_STACK'; it can be onedl or openmmlab" >&2
    exit 2
    ;;
esac

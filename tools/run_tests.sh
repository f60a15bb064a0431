#!/usr/bin/env bash
# bash tools/run_tests.sh [--quick | --slow | FILE or option of pytest ...]
#   (nothing)   makes or checks the environment, lints, checks types and runs the tests, in 2 processes; the fast ones
#               must reach COVERAGE percent of the package's lines
#   --quick     the core tests only, about a minute; does not check the environment
#   --slow      the same as without options, on the original OpenMMLab releases too, and then the soak and property
#               tests: hours
#   FILE ...    only pytest with what you give, such as tests/test_configs.py -k retinanet
#   -h, --help  print this
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/stack.sh
COVERAGE=95
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
workers=(-n 2 --dist loadfile)

case ${1:-} in
--quick)
    source tools/common.sh
    exec "$PYTHON" -m pytest -m core "${workers[@]}" "${@:2}"
    ;;
'' | --slow)
    [ $# -le 1 ] || usage
    ;;
*)
    source tools/common.sh
    exec "$PYTHON" -m pytest -m 'not soak' "$@"
    ;;
esac

if [ "${1:-}" = --slow ]; then
    if [ -n "${PYTHON:-}" ]; then
        echo 'error: --slow makes an environment for each stack: leave PYTHON unset' >&2
        exit 2
    fi
    MMLINGLO_STACK=openmmlab bash tools/run_tests.sh
fi
if [ -z "${PYTHON:-}" ]; then bash tools/setup_env.sh; fi
source tools/common.sh
if [ "${MMLINGLO_STACK:-onedl}" = onedl ]; then
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m mypy
    coverage=(--cov --cov-report term-missing:skip-covered --cov-fail-under "$COVERAGE")
fi
"$PYTHON" -m pytest -m 'not slow and not soak' "${workers[@]}" ${coverage[@]+"${coverage[@]}"}
"$PYTHON" -m pytest -m 'slow and not soak' "${workers[@]}"
if [ "${1:-}" = --slow ]; then "$PYTHON" -m pytest -m soak; fi

#!/usr/bin/env bash
# bash tools/run_tests.sh [--quick | --slow | FILE or option of pytest ...]
#   (nothing)   make or check the environment, lint, check types, and run the fast tests in 2 processes. The tests must
#               reach COVERAGE percent of the package's lines
#   --quick     run the core tests only, in about a minute. The environment is not checked
#   --slow      do the same as without options, then run the tests that train, build and kill trainings. This takes an
#               hour on 2 cores
#   FILE ...    run only pytest with what you give, such as tests/test_configs.py -k retinanet
#   -h, --help  print this
# Set MMLINGLO_STACK=openmmlab to run the tests on the original OpenMMLab releases.
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

if [ -z "${PYTHON:-}" ]; then bash tools/setup_env.sh; fi
source tools/common.sh
if [ "${MMLINGLO_STACK:-onedl}" = onedl ]; then
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m mypy
    coverage=(--cov --cov-report term-missing:skip-covered --cov-fail-under "$COVERAGE")
fi
"$PYTHON" -m pytest -m 'not slow and not soak' "${workers[@]}" ${coverage[@]+"${coverage[@]}"}
if [ "${1:-}" = --slow ]; then
    "$PYTHON" -m pytest -m 'slow and not soak' "${workers[@]}"
    "$PYTHON" -m pytest -m soak
fi

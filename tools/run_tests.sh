#!/usr/bin/env bash
# bash tools/run_tests.sh [--slow] [pytest options]
# Sets the environment up if need be and runs all tests, those included that start trainings.
# Without options the fast ones come first and must reach COVERAGE percent of the package's lines.
#   --slow  first on the original OpenMMLab releases, then also the soak and the property tests: hours
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
COVERAGE=95
fast='not slow and not soak' rest='slow and not soak'
if [ "${1:-}" = --slow ]; then
    shift
    if [ -n "${PYTHON:-}" ]; then
        echo 'error: --slow makes an environment for each stack: leave PYTHON unset' >&2
        exit 2
    fi
    MMLINGLO_STACK=openmmlab bash "${BASH_SOURCE[0]}" "$@"
    rest='slow or soak'
fi
if [ -z "${PYTHON:-}" ]; then bash tools/setup_env.sh; fi
source tools/common.sh
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
if [ $# -gt 0 ] || [ "${MMLINGLO_STACK:-onedl}" != onedl ]; then
    exec "$PYTHON" -m pytest -m "($fast) or ($rest)" "$@"
fi
"$PYTHON" -m pytest -m "$fast" --cov --cov-report term-missing:skip-covered --cov-fail-under "$COVERAGE"
exec "$PYTHON" -m pytest -m "$rest"

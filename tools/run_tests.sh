#!/usr/bin/env bash
# bash tools/run_tests.sh [--slow] [pytest options]
# Sets the environment up if need be and runs all tests, those included that start trainings.
#   --slow  first on the original OpenMMLab releases, then also the soak and the property tests: hours
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
selected='not soak'
if [ "${1:-}" = --slow ]; then
    shift
    if [ -n "${PYTHON:-}" ]; then
        echo 'error: --slow makes an environment for each stack: leave PYTHON unset' >&2
        exit 2
    fi
    MMLINGLO_STACK=openmmlab bash "${BASH_SOURCE[0]}" "$@"
    selected='soak or not soak'
fi
if [ -z "${PYTHON:-}" ]; then bash tools/setup_env.sh; fi
source tools/common.sh
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest -m "$selected" "$@"

#!/usr/bin/env bash
# bash tools/run_tests.sh [pytest options]
# Sets the environment up if need be and runs all tests, those included that start trainings.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${PYTHON:-}" ]; then bash tools/setup_env.sh; fi
source tools/common.sh
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest -m 'slow or not slow' "$@"

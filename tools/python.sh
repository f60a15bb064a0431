# To be sourced. Sets ROOT, the checkout, and PYTHON: as given, else the checkout's .venv, else `python`.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${MMLINGLO_VENV:-$ROOT/.venv}
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    if [ -x "$VENV/bin/python" ]; then PYTHON=$VENV/bin/python; fi
fi
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}

#!/usr/bin/env bash
# From a fresh machine to the passed tests. Arguments go to pytest, such as: -m "not slow"
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
bash scripts/environment.sh "$venv" test,quickstart,bitsandbytes
# one process a core, of one thread each: several threads in several processes slow one another
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$venv/bin/python" -m pytest -n "${JOBS:-auto}" "$@"

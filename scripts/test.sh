#!/usr/bin/env bash
# From a fresh machine to the passed tests. Arguments go to pytest, such as: -m "not slow"
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
bash scripts/environment.sh "$venv" test,quickstart,bitsandbytes
exec "$venv/bin/python" -m pytest "$@"

#!/usr/bin/env bash
# From a fresh machine to the finished quickstart. Arguments go to examples/quickstart.py; see its --help.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
bash scripts/environment.sh "$venv" quickstart
exec "$venv/bin/python" examples/quickstart.py "$@"

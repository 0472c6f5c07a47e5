#!/usr/bin/env bash
# Makes a virtual environment with this project in it, or brings it up to date.
# usage: scripts/environment.sh FOLDER EXTRAS, for example: scripts/environment.sh .venv test,quickstart
# PYTHON names the interpreter (python3 by default), CONSTRAINTS a file of versions, by default the one that keeps the
# download light.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1 extras=$2
[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint "${CONSTRAINTS:-.ci/constraints.txt}" --editable ".[$extras]"

#!/usr/bin/env bash
# Makes a virtual environment with this project in it, or brings it up to date.
# usage: scripts/environment.sh FOLDER EXTRAS, for example: scripts/environment.sh .venv test,quickstart
# PYTHON names the interpreter (python3 by default), CONSTRAINTS a file of versions, by default those that were seen
# working together, and UPGRADE packages to bring to their newest version. With BASE, the folder of another environment, only
# what that one has not, or in another version, is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1 extras=$2
packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
# without pip it was interrupted while it was made; nothing but an environment is cleared
if ! "$folder/bin/python" -m pip --version > /dev/null 2>&1; then
    clear=$([ ! -e "$folder/pyvenv.cfg" ] || echo --clear)
    "${PYTHON:-python3}" -m venv $clear "$folder"
    # pip then counts them as installed, and leaves them alone where it needs another version
    [ -z "${BASE:-}" ] || echo "import site; site.addsitedir('$(packages "$BASE")')" > "$(packages "$folder")/base.pth"
fi
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint "${CONSTRAINTS:-.ci/constraints.txt}" ${UPGRADE:+--upgrade $UPGRADE} --editable ".[$extras]"

#!/usr/bin/env bash
# Installs what the tests of the report's page in a real browser need, and runs them. Arguments go to pytest.
# Chromium comes from the system's packages (apt-get, as root), axe-core from npm into .browser/, Playwright from PyPI
# without a browser of its own. CHROMIUM and AXE_CORE name others; PYTHON names an interpreter that has all but Playwright.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${CHROMIUM:-}" ] && ! command -v chromium > /dev/null && ! command -v chromium-browser > /dev/null; then
    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-liberation
fi
if [ -z "${AXE_CORE:-}" ] && [ ! -f .browser/node_modules/axe-core/axe.min.js ]; then
    npm install --silent --no-save --prefix .browser axe-core@4
fi
if [ -z "${PYTHON:-}" ]; then
    venv=${VENV:-.venv}
    bash scripts/environment.sh "$venv" test
    PYTHON=$venv/bin/python
fi
[ -d .browser/python/playwright ] || "$PYTHON" -m pip install --quiet --target .browser/python playwright
PYTHONPATH=$PWD:$PWD/.browser/python exec "$PYTHON" -m pytest -p no:cacheprovider -m browser -rs tests/report "$@"

#!/usr/bin/env bash
# The quick tests with the lowest versions that pyproject.toml allows. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV=.ci/venv-lowest CONSTRAINTS=.ci/lowest.txt
exec bash scripts/test.sh -m "not slow" "$@"

#!/usr/bin/env bash
# The quick tests with the lowest versions that pyproject.toml allows. Arguments go to pytest. For BASE see environment.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV=.ci/venv-lowest${BASE:+-over-base} CONSTRAINTS=.ci/lowest.txt
exec bash scripts/test.sh -m "not slow" "$@"

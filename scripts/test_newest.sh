#!/usr/bin/env bash
# The quick tests with the newest versions on PyPI, but for torch, whose newest is no CPU build. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV=.ci/venv-newest CONSTRAINTS=.ci/newest.txt
bash scripts/environment.sh "$VENV" test
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$CONSTRAINTS" \
    --upgrade transformers trl peft datasets accelerate huggingface_hub
exec bash scripts/test.sh -m "not slow" "$@"

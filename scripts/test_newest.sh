#!/usr/bin/env bash
# The quick tests with the newest versions on PyPI, but for torch. Arguments go to pytest. For BASE see environment.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV=.ci/venv-newest${BASE:+-over-base} CONSTRAINTS=.ci/newest.txt
export UPGRADE="transformers trl peft datasets accelerate huggingface_hub"
exec bash scripts/test.sh -m "not slow" "$@"

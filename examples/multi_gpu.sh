#!/usr/bin/env bash
# P2D on all GPUs of this machine. The first argument is a file of examples/accelerate_configs/ or your own; all others go
# to scripts/p2d_sft.py, such as: --learning_rate 1e-3. See docs/many-gpus.md.
# usage: examples/multi_gpu.sh [CONFIG] [FLAGS ...]
set -euo pipefail
cd "$(dirname "$0")/.."
config=${1:-examples/accelerate_configs/multi_gpu.yaml}
exec accelerate launch --config_file "$config" scripts/p2d_sft.py --config examples/recipes/p2d.yaml "${@:2}"

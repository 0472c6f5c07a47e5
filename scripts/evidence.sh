#!/usr/bin/env bash
# From a fresh machine to the small profile's results in the folder RESULTS, and page.md with its pictures there; one hour to one
# and a half on two cores with fast bfloat16 (AVX512-BF16 or AMX), several without. What is there is not run again.
# Only with RESULTS=benchmarks/results/evidence, where ours are, it goes on from these and rewrites docs/results.md and the README.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
bash scripts/environment.sh "$venv" quickstart,plots,bm25
# one for each core, before the number of threads is set: nproc goes by it
jobs=${JOBS:-$(env -u OMP_NUM_THREADS nproc)}
export OMP_NUM_THREADS=1
output=${RESULTS:-rerun}
"$venv/bin/python" benchmarks/run_evidence.py run "${PROFILE:-benchmarks/evidence/profiles/small.yaml}" \
    --jobs "$jobs" --output "$output" "$@"
"$venv/bin/python" benchmarks/run_evidence.py report --output "$output"

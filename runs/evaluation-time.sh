#!/usr/bin/env bash
# What evaluate.py takes and where it goes, beside an earlier commit: results/benchmark-evaluation.json and its table.
#   runs/evaluation-time.sh [OLD]
# LIMIT sets the passages of each length, OMP_NUM_THREADS the threads.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python benchmarks/evaluation.py --old "${1:-0c58212^}" --limit "${LIMIT:-100}" --output results/benchmark-evaluation.json
python runs/readme.py

#!/usr/bin/env bash
# Tokens a second of decoding against batch size: results/benchmark-decoding.json and its plot.
#   runs/decoding.sh
# OMP_NUM_THREADS sets the threads.
set -euo pipefail
cd "$(dirname "$0")/.."
python benchmarks/decoding.py --checkpoints models/arxiv-mini/compressor models/smollm2-135m/compressor \
  --tokens "${TOKENS:-16}" --repeats "${REPEATS:-3}" --threads "${OMP_NUM_THREADS:-1}" --output results/benchmark-decoding.json

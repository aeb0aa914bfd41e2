#!/usr/bin/env bash
# What a memory of the bundled compressor saves against the full passage: results/efficiency.json and its plot.
#   runs/efficiency.sh
# Times are of this machine: run it while nothing else runs. OMP_NUM_THREADS sets the threads.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/work.sh
python evaluate.py --checkpoint models/arxiv-mini/compressor --task efficiency --tokens 16 4 1 --lengths 500 \
  --new_tokens 100 200 300 400 --repeats 5 --resume --output "$work/efficiency"
mkdir -p results
cp "$work/efficiency/metrics.json" results/efficiency.json
cp "$work/efficiency/table.md" results/efficiency.md
cp "$work/efficiency/efficiency.png" results/efficiency.png
finished

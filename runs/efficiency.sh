#!/usr/bin/env bash
# What a memory of SmolLM2's compressor saves against the full passage: results/smollm2-135m/efficiency.json and its plot.
#   runs/efficiency.sh
# Times are of this machine: run it while nothing else runs. OMP_NUM_THREADS sets the threads.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/work.sh
python evaluate.py --checkpoint models/smollm2-135m/compressor --task efficiency --tokens 16 4 1 --lengths 500 \
  --new_tokens 100 200 300 400 --repeats 3 --resume --output "$work/efficiency"
results=results/smollm2-135m
mkdir -p $results
cp "$work/efficiency/metrics.json" $results/efficiency.json
cp "$work/efficiency/efficiency.png" $results/efficiency.png
python runs/readme.py
finished

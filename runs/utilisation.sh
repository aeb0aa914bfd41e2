#!/usr/bin/env bash
# What each memory token and layer of SmolLM2's compressor is used for: results/smollm2-135m/utilisation.json and its plot.
#   runs/utilisation.sh [LIMIT]
# LIMIT is the number of passages, and of questions (12); about a quarter of an hour on one CPU core.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/work.sh
python evaluate.py --checkpoint models/smollm2-135m/compressor --task utilisation \
  --data arxiv-test squad-dev --limit "${1:-12}" --resume --output "$work/utilisation"
results=results/smollm2-135m
mkdir -p $results
cp "$work/utilisation/metrics.json" $results/utilisation.json
cp "$work/utilisation/utilisation.png" $results/utilisation.png
python runs/readme.py
finished

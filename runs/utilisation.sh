#!/usr/bin/env bash
# What each memory token and layer of the bundled compressor is used for: results/utilisation.json and its plots.
#   runs/utilisation.sh [LIMIT]
# LIMIT is the number of passages, and of questions of each set (12); about three minutes on one CPU core.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/work.sh
python evaluate.py --checkpoint models/arxiv-mini/compressor --task utilisation \
  --data arxiv-test squad-dev arxivqa-test --limit "${1:-12}" --resume --output "$work/utilisation"
mkdir -p results
cp "$work/utilisation/metrics.json" results/utilisation.json
cp "$work/utilisation/table.md" results/utilisation.md
cp "$work/utilisation/utilisation.png" results/utilisation-utilisation.png
finished

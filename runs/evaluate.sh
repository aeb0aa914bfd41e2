#!/usr/bin/env bash
# Measures arxiv-mini's regeneration: results/regeneration.json, and what README.md and docs/ show of it.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/work.sh
python evaluate.py --checkpoint models/arxiv-mini/compressor --task regeneration --data arxiv-test \
  --tokens 16 4 1 --lengths 96 192 288 384 480 --limit 100 --batch_size 50 --resume --output "$work/regeneration"
cp "$work/regeneration/metrics.json" results/regeneration.json
python runs/readme.py
finished

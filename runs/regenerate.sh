#!/usr/bin/env bash
# Trains the bundled compressor and writes it to models/arxiv-mini/compressor.
#   runs/regenerate.sh CORPUS
# A run that was stopped goes on when called again.
set -euo pipefail
cd "$(dirname "$0")/.."
corpus=${1:?usage: runs/regenerate.sh CORPUS}
python train.py --config configs/arxiv-mini/regenerate.yaml --data.train "[$corpus]" --data.validation "[$corpus]" \
  --training.resume true
python -m compressor.cli export-compressor --checkpoint outputs/arxiv-mini/regenerate/final \
  --output models/arxiv-mini/compressor --overwrite
mkdir -p results
cp outputs/arxiv-mini/regenerate/log.jsonl results/regenerate-log.jsonl
cp outputs/arxiv-mini/regenerate/run.json results/regenerate-run.json

#!/usr/bin/env bash
# Under ten minutes on one or two CPU cores: trains a freshly initialised compressor for the bundled base on the abstracts in data/.
# Copies its log to results/train-mini-log.jsonl, which the README's loss curve is drawn from.
set -euo pipefail
cd "$(dirname "$0")/.."
python train.py --config configs/arxiv-mini/mini.yaml "$@"
mkdir -p results
cp outputs/arxiv-mini/mini/log.jsonl results/train-mini-log.jsonl

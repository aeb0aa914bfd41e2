#!/usr/bin/env bash
# Under ten minutes on a CPU core with bfloat16 instructions: trains a freshly initialised compressor for the bundled base on the abstracts
# in data/, into a folder of its own. With --record, its log becomes results/train-mini-log.jsonl, which the README's loss
# curve is drawn from.
#   runs/train-mini.sh [--record] [settings of train.py]
set -euo pipefail
cd "$(dirname "$0")/.."
record=false
if [ "${1:-}" = --record ]; then record=true; shift; fi
output=outputs/train-mini-$(date +%Y%m%d-%H%M%S)
python train.py --config configs/arxiv-mini/mini.yaml --output "$output" "$@"
if $record; then
  cp "$output/log.jsonl" results/train-mini-log.jsonl
  python runs/readme.py
fi

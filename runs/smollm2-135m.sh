#!/usr/bin/env bash
# Trains the compressor of SmolLM2-135M-Instruct, writes it to models/smollm2-135m/compressor and measures it.
#   runs/smollm2-135m.sh CORPUS
# CORPUS: folder or file of abstracts. A run that was stopped goes on when called again; --training.* may follow.
set -euo pipefail
cd "$(dirname "$0")/.."
corpus=${1:?usage: runs/smollm2-135m.sh CORPUS [OPTIONS OF train.py]}
shift
output=outputs/smollm2-135m
python -m compressor fetch smollm2-135m
if [ ! -d "$output/regenerate/final" ]; then
  python train.py --config configs/smollm2-135m/regenerate.yaml --data.train "[$corpus]" --data.validation "[$corpus]" \
    --training.resume true "$@"
  [ -d "$output/regenerate/final" ] # a run that a signal stopped ends well too
fi
mkdir -p results/smollm2-135m
cp "$output/regenerate/log.jsonl" results/smollm2-135m/regenerate-log.jsonl
cp "$output/regenerate/run.json" results/smollm2-135m/regenerate-run.json
python -c 'import sys, torch; from compressor import Compressor
Compressor.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2], torch.bfloat16)' \
  "$output/regenerate/final" models/smollm2-135m/compressor
runs/evaluate-smollm2-135m.sh

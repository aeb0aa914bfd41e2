#!/usr/bin/env bash
# What a memory in the context does to unrelated questions: results/smollm2-135m/interference.json.
#   runs/interference.sh [QUESTIONS [DATA]]
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p results/smollm2-135m
source runs/work.sh
python evaluate.py --checkpoint models/smollm2-135m/compressor --task interference --data "${2:-squad-dev}" --limit "${1:-40}" \
  --tokens 16 4 --question_tokens 96 --batch_size 40 --resume --output "$work"
cp "$work/metrics.json" results/smollm2-135m/interference.json
finished

#!/usr/bin/env bash
# Every trained method after the same training (runs/methods.sh), for regeneration and question answering:
# results/methods-regeneration.json (methods-refined.json: after 10 gradient steps on each memory), results/methods-qa.json,
# results/methods-loss.png and README.md's part.
#   runs/evaluate-methods.sh [PASSAGES [QUESTIONS]]
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/work.sh
methods=()
for name in kv icae anchor mean-pool reference-500x sentence-embedding; do methods+=("$name=models/arxiv-mini/methods/$name"); done
common=(--checkpoint models/arxiv-mini/methods/kv --tokens 16 4 1)
regeneration=("${common[@]}" --limit "${1:-60}" --task regeneration --data arxiv-test --methods "${methods[@]}")
python evaluate.py "${regeneration[@]}" --lengths 48 96 --resume --output "$work/regeneration"
python evaluate.py "${regeneration[@]}" --lengths 96 --refine_steps 10 --resume --output "$work/refined"
python evaluate.py "${common[@]}" --limit "${2:-100}" --task qa --data squad-dev arxivqa-test --methods "${methods[@]}" full none \
  --resume --output "$work/qa"
cp "$work/regeneration/metrics.json" results/methods-regeneration.json
cp "$work/refined/metrics.json" results/methods-refined.json
cp "$work/qa/metrics.json" results/methods-qa.json
python runs/readme.py
finished

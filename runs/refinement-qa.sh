#!/usr/bin/env bash
# Answers from what refined memories regenerate, about windows and about whole contexts: results/refinement/qa*.json, README.md.
#   runs/refinement-qa.sh [LIMIT] [windows|whole]
set -euo pipefail
cd "$(dirname "$0")/.."
limit=${1:-120} chosen=${2:-windows whole} steps=20
mkdir -p results/refinement
source runs/work.sh
for name in $chosen; do
  case $name in windows) about=(--tokens 16 4 1 --question_tokens 96) ;; *) about=(--tokens 16) ;; esac
  python evaluate.py --checkpoint models/arxiv-mini/compressor --task qa --data squad-dev arxivqa-test --limit "$limit" \
    --methods recite full none "${about[@]}" --refine_steps "$steps" --batch_size 20 --resume --output "$work/$name"
  cp "$work/$name/metrics.json" "results/refinement/qa-$name.json"
done
python runs/readme.py
finished

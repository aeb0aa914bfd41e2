#!/usr/bin/env bash
# Question answering from memories, beside the whole passage, none, and hard prompts: results/qa.json and README.md's part.
#   runs/evaluate-qa.sh [LIMIT]
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python evaluate.py --checkpoint models/arxiv-mini/compressor --task qa --data squad-dev arxivqa-test --limit "${1:-300}" \
  --methods kv full none truncate keywords summary --tokens 16 4 1 --output "$work/qa"
cp "$work/qa/metrics.json" results/qa.json
python runs/readme.py

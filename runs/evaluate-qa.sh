#!/usr/bin/env bash
# Question answering from memories, beside the whole passage, none, and hard prompts: results/qa.json and README.md's part.
#   runs/evaluate-qa.sh [LIMIT]
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/work.sh
limit=${1:-150} checkpoint=models/arxiv-mini/compressor
python evaluate.py --checkpoint "$checkpoint" --task qa --data squad-dev arxivqa-test --limit "$limit" --batch_size 50 \
  --methods kv full none truncate keywords summary --tokens 16 4 1 --resume --output "$work/qa"
python evaluate.py --checkpoint "$checkpoint" --task qa --data squad-dev arxivqa-test --limit "$limit" --batch_size 50 \
  --methods kv recite full none --tokens 16 4 --segment_tokens 96 --resume --output "$work/qa-segments"
python evaluate.py --checkpoint "$checkpoint" --task qa --data squad-dev arxivqa-test --limit "$limit" --batch_size 50 \
  --methods kv recite full none truncate summary --tokens 16 4 1 --question_tokens 96 --resume --output "$work/qa-windows"
for name in qa qa-segments qa-windows; do cp "$work/$name/metrics.json" "results/$name.json"; done
python runs/readme.py
finished

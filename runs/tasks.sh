#!/usr/bin/env bash
# The tasks besides regeneration and question answering, each from memories (one for each 96 tokens), from the text that they
# regenerate, the whole passage and none: results/tasks/*.json and README.md's part. About ten minutes on one core.
#   runs/tasks.sh [FOLDER [LIMIT]]
# FOLDER holds scitldr-test, csabstruct-test, sst2-dev and mrpc-dev as JSON lines (.jsonl.gz), with the fields that
# `python evaluate.py --task NAME` names; tasks whose files are not there are left out. The other two use shipped abstracts.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/work.sh
folder=${1:-none} limit=${2:-50}
mkdir -p results/tasks
task() { # NAME OF THE FILE, TASK, then settings
  local name=$1 task=$2; shift 2
  python evaluate.py --checkpoint models/arxiv-mini/compressor --task "$task" --methods kv recite full none --tokens 16 4 1 --batch_size 50 \
    --segment_tokens 96 --limit "$limit" --resume --output "$work/$name" "$@"
  cp "$work/$name/metrics.json" "results/tasks/$name.json"
}
task continuation continuation --data arxiv-test
task retrieve retrieve --data arxiv-test
if [ -f "$folder/scitldr-test.jsonl.gz" ]; then task summarise summarise --data "$folder/scitldr-test.jsonl.gz"; fi
if [ -f "$folder/csabstruct-test.jsonl.gz" ]; then task classify-roles classify --data "$folder/csabstruct-test.jsonl.gz"; fi
if [ -f "$folder/sst2-dev.jsonl.gz" ]; then task classify-sentiment classify --data "$folder/sst2-dev.jsonl.gz"; fi
if [ -f "$folder/mrpc-dev.jsonl.gz" ]; then task paraphrase paraphrase --data "$folder/mrpc-dev.jsonl.gz"; fi
python runs/readme.py
finished

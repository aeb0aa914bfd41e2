#!/usr/bin/env bash
# Every task but regeneration and questions, from memories (one for each 96 tokens), from the text that they regenerate, from the
# whole passage and from nothing: results/tasks.json and the table of docs/tasks.md. About half an hour on one core with LIMIT 12.
#   runs/tasks.sh [FOLDER [LIMIT]]
# FOLDER holds scitldr-test, csabstruct-test, sst2-dev and mrpc-dev as JSON lines (.jsonl.gz), and entities.jsonl, which
# `compressor entities` makes of SQuAD's development set; tasks whose files are not there keep the figures they have.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/work.sh
folder=${1:-none} limit=${2:-12} checkpoint=${CHECKPOINT:-models/smollm2-135m/compressor}
task() { # PRESET, DATA
  case $2 in */*) [ -f "$2" ] || return 0 ;; esac
  python evaluate.py --checkpoint "$checkpoint" --task "$1" --data "$2" --limit "$limit" --batch_size 12 --segment_tokens 96 \
    --resume --output "$work/$1"
  python - "$work/$1/metrics.json" "$1" <<'END'
import json, sys
from pathlib import Path
kept = ("figures", "rows", "notes", "checkpoint", "base", "data", "command", "versions", "intervals", "left_out")
metrics, path = json.loads(Path(sys.argv[1]).read_text()), Path("results/tasks.json")
found = json.loads(path.read_text()) if path.exists() else {}
found[sys.argv[2]] = {name: metrics[name] for name in kept}
path.write_text(json.dumps(dict(sorted(found.items())), indent=1, ensure_ascii=False) + "\n")
END
}
task sentiment "$folder/sst2-dev.jsonl.gz"
task paraphrase "$folder/mrpc-dev.jsonl.gz"
task translate parallel-en-fr
task roles "$folder/csabstruct-test.jsonl.gz"
task entities "$folder/entities.jsonl"
task summarise "$folder/scitldr-test.jsonl.gz"
python runs/readme.py
finished

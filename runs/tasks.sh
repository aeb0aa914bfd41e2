#!/usr/bin/env bash
# Every task but regeneration and questions, from memories (one for each 96 tokens), from the text that they regenerate, from the
# whole passage and from nothing: results/tasks.json and the table of docs/tasks.md. About half an hour on one core with LIMIT 12.
#   runs/tasks.sh [FOLDER [LIMIT [TASK...]]]
# FOLDER holds scitldr-test, csabstruct-test, sst2-dev and mrpc-dev as JSON lines (.jsonl.gz), and entities.jsonl and
# entities-asked.jsonl, which `compressor entities` makes of SQuAD's development set (--labels spacy, asked). Tasks whose files
# are not there, or that are not among TASK..., keep the figures they have. What training on instructions brings
# (results/tasks-instructed.json): CHECKPOINT=outputs/smollm2-135m/instruct/final METHODS=kv RESULTS=results/tasks-instructed.json
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/work.sh
folder=${1:-none} limit=${2:-12} chosen=" ${*:3} " checkpoint=${CHECKPOINT:-models/smollm2-135m/compressor}
results=${RESULTS:-results/tasks.json} methods=(${METHODS:+--methods $METHODS})
task() { # PRESET, DATA, NAME OF THE ROW
  local name=${3:-$1}
  [ "$chosen" = "  " ] || [[ $chosen = *" $name "* ]] || return 0
  case $2 in */*) [ -f "$2" ] || return 0 ;; esac
  python evaluate.py --checkpoint "$checkpoint" --task "$1" --data "$2" --limit "$limit" --batch_size 12 --segment_tokens 96 \
    "${methods[@]}" --resume --output "$work/$name"
  python - "$work/$name/metrics.json" "$name" "$results" <<'END'
import json, sys
from pathlib import Path
kept = ("figures", "rows", "notes", "checkpoint", "base", "data", "command", "versions", "intervals", "left_out")
metrics, path = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[3])
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
task entities "$folder/entities-asked.jsonl" asked
task summarise "$folder/scitldr-test.jsonl.gz"
python runs/readme.py
finished

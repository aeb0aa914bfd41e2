#!/usr/bin/env bash
# Questions of sets that nothing was trained on, from SmolLM2's memories, between the trained bounds: results/smollm2-135m/:
# windows of 96 tokens (qa-sets.json), and whole contexts in one memory and in one for each 96 tokens (qa-whole.json,
# qa-segments.json). About an hour on one core with LIMIT 40.
#   runs/qa-sets.sh FOLDER [LIMIT [windows|whole|segments]]
# FOLDER holds nq-dev, sleepqa-test, policyqa-test, pubmedqa and squad-dev as JSON lines (.jsonl.gz).
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/work.sh
folder=${1:?usage: runs/qa-sets.sh FOLDER [LIMIT [windows|whole|segments]]} limit=${2:-40} chosen=${3:-windows whole segments}
models=models/smollm2-135m
ask() { # NAME, METHODS AND OPTIONS
  local name=$1
  shift
  python evaluate.py --dtype auto --checkpoint $models/compressor --task qa --limit "$limit" --batch_size 20 --resume --output "$work/$name" "$@"
  cp "$work/$name/metrics.json" "results/smollm2-135m/$name.json"
}
bounds=(full-tuned=$models/full-tuned none-tuned=$models/none-tuned)
sets() { for name in "$@"; do echo "$folder/$name.jsonl.gz"; done; }
for part in $chosen; do
  case $part in
    windows) ask qa-sets --methods kv recite-tuned "${bounds[@]}" --tokens 16 4 1 --question_tokens 96 \
      --data $(sets nq-dev sleepqa-test policyqa-test pubmedqa) ;;
    whole) ask qa-whole --methods kv "${bounds[@]}" --tokens 16 --data $(sets squad-dev nq-dev pubmedqa) ;;
    segments) ask qa-segments --methods kv --tokens 16 --segment_tokens 96 --data $(sets squad-dev nq-dev pubmedqa) ;;
  esac
done
python runs/readme.py
finished

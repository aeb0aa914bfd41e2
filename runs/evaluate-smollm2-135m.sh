#!/usr/bin/env bash
# Measures the bundled compressor of SmolLM2-135M-Instruct: results/smollm2-135m/, and what README.md and docs/ show of it.
#   runs/evaluate-smollm2-135m.sh [QUESTIONS OF A SET]
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p outputs results/smollm2-135m
work=$(mktemp -d outputs/run.XXXXXX)
trap 'rm -rf "$work"' EXIT
python evaluate.py --dtype auto --checkpoint models/smollm2-135m/compressor --task regeneration --data arxiv-test \
  --tokens 16 4 1 --lengths 48 96 192 288 --limit 40 --batch_size 40 --output "$work/regeneration"
cp "$work/regeneration/metrics.json" results/smollm2-135m/regeneration.json
# Outside its domain: the paragraphs of SQuAD's shipped excerpt.
python -c 'import sys, pandas
frame = pandas.read_parquet("data/squad-dev.parquet").drop_duplicates("context").rename(columns={"context": "text"})
frame[["text"]].to_json(sys.argv[1], orient="records", lines=True)' "$work/contexts.jsonl"
python evaluate.py --dtype auto --checkpoint models/smollm2-135m/compressor --task regeneration --data "$work/contexts.jsonl" \
  --tokens 16 4 1 --lengths 96 --limit 40 --batch_size 40 --output "$work/out-of-domain"
cp "$work/out-of-domain/metrics.json" results/smollm2-135m/out-of-domain.json
# Questions about windows of 96 tokens, between the bounds.
models=models/smollm2-135m bounds=()
for name in full-tuned none-tuned; do
  if [ -d "$models/$name" ]; then bounds+=("$name=$models/$name"); fi
done
python evaluate.py --dtype auto --checkpoint $models/compressor --task qa --data squad-dev arxivqa-test --limit "${1:-40}" --batch_size 40 \
  --methods kv recite-tuned full none "${bounds[@]}" --tokens 16 4 1 \
  --question_tokens 96 --output "$work/qa-windows"
cp "$work/qa-windows/metrics.json" results/smollm2-135m/qa-windows.json
python runs/readme.py --snippet > "$work/snippet.py"
(cd "$work" && PYTHONPATH="$OLDPWD" python snippet.py) > results/snippet.txt
python runs/readme.py

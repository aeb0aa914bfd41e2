#!/usr/bin/env bash
# Trains the bundled base from text, then on with more questions, and writes it to models/arxiv-mini/base.
#   runs/base.sh CORPUS SQUAD_TRAIN
# CORPUS is a folder that `compressor corpus --config configs/corpora/arxiv-2026.yaml` built; SQUAD_TRAIN is SQuAD
# v1.1's training set as JSON lines (context, question, answers). A run that was stopped goes on when called again.
set -euo pipefail
cd "$(dirname "$0")/.."
corpus=${1:?usage: runs/base.sh CORPUS SQUAD_TRAIN} squad=${2:?usage: runs/base.sh CORPUS SQUAD_TRAIN}
output=outputs/arxiv-mini
runs/rule-questions.sh "$corpus" "$output/questions"
if [ ! -d "$output/base/final" ]; then
  python train.py --config configs/arxiv-mini/base.yaml --data.train "[$corpus]" --data.validation "[$corpus]" \
    --data.qa "[$squad]" --training.resume true
  [ -d "$output/base/final" ] # a run that a signal stopped ends well too
fi
python train.py --config configs/arxiv-mini/base-continue.yaml --data.train "[$corpus]" --data.validation "[$corpus]" \
  --data.qa "[$squad,$output/questions]" --training.resume true
[ -d "$output/base-continue/final" ]
python -m compressor.cli export-base --run "$output/base-continue" --output models/arxiv-mini/base --overwrite
mkdir -p results
cp "$output/base-continue/log.jsonl" results/base-continue-log.jsonl

#!/usr/bin/env bash
# Trains the bundled compressor on (more weight on few memory tokens), then to answer questions as well as to regenerate, and
# writes it to models/arxiv-mini/compressor-qa.
#   runs/answer.sh CORPUS SQUAD_TRAIN
# CORPUS: folder or file of abstracts; SQUAD_TRAIN: questions besides those made from the corpus by rules.
# A run that was stopped goes on when called again.
set -euo pipefail
cd "$(dirname "$0")/.."
corpus=${1:?usage: runs/answer.sh CORPUS SQUAD_TRAIN} squad=${2:?usage: runs/answer.sh CORPUS SQUAD_TRAIN}
output=outputs/arxiv-mini
if [ ! -d "$output/questions" ]; then
  python -m compressor.cli questions --config configs/corpora/arxivqa-rules.yaml --source "$corpus" --sample.train 25000 \
    --output "$output/questions"
fi
if [ ! -d "$output/continue/final" ]; then
  python train.py --config configs/arxiv-mini/continue.yaml --data.train "[$corpus]" --data.validation "[$corpus]" \
    --training.resume true
fi
python train.py --config configs/arxiv-mini/answer.yaml --data.train "[$corpus]" --data.validation "[$corpus]" \
  --data.questions "[$output/questions,$squad]" --init "$output/continue/final" --training.resume true
python -m compressor.cli export-compressor --checkpoint "$output/answer/final" \
  --output models/arxiv-mini/compressor-qa --overwrite
mkdir -p results
cp "$output/continue/log.jsonl" results/continue-log.jsonl
cp "$output/answer/log.jsonl" results/answer-log.jsonl
cp "$output/answer/run.json" results/answer-run.json

#!/usr/bin/env bash
# Trains the bundled compressor in five stages (regenerate; dense: short passages in few memory tokens; answer: questions too;
# together: longest, and the questions' contexts as passages too; finish: the lengths it is meant for) and writes it to
# models/arxiv-mini/compressor. About five hours on one core.
# The bundled weights went through more than this (models/arxiv-mini/README.md): a run of it has not been measured.
#   runs/compressor.sh CORPUS SQUAD_TRAIN
# CORPUS: folder or file of abstracts; SQUAD_TRAIN: questions besides those made from the corpus by rules.
# A run that was stopped goes on when called again.
set -euo pipefail
cd "$(dirname "$0")/.."
corpus=${1:?usage: runs/compressor.sh CORPUS SQUAD_TRAIN} squad=${2:?usage: runs/compressor.sh CORPUS SQUAD_TRAIN}
output=outputs/arxiv-mini
runs/rule-questions.sh "$corpus" "$output/questions"
source runs/made-from.sh
passages=$output/context-passages.jsonl
if ! made_from "$passages" "$squad" models/arxiv-mini/base; then
  python runs/context-passages.py "$squad" --output "$passages"
  stamp "$passages" "$squad" models/arxiv-mini/base
fi
mkdir -p results
for stage in regenerate dense answer together finish; do
  train=$corpus
  case $stage in together|finish) train="$corpus,$passages" ;; esac
  # One that is done ends at once, or with an error if it was made from other data.
  python train.py --config "configs/arxiv-mini/$stage.yaml" --data.train "[$train]" --data.validation "[$corpus]" \
    --data.questions "[$output/questions,$squad]" --training.resume true
  [ -d "$output/$stage/final" ] # a run that a signal stopped ends well too
  cp "$output/$stage/log.jsonl" "results/$stage-log.jsonl"
  cp "$output/$stage/run.json" "results/$stage-run.json"
done
python -c 'import sys, torch; from compressor import Compressor
Compressor.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2], torch.bfloat16)' "$output/finish/final" models/arxiv-mini/compressor

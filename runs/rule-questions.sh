#!/usr/bin/env bash
# Cloze questions that rules make from the abstracts of a corpus, for training base and compressor; made once.
#   runs/rule-questions.sh CORPUS OUTPUT
set -euo pipefail
cd "$(dirname "$0")/.."
corpus=${1:?usage: runs/rule-questions.sh CORPUS OUTPUT} output=${2:?usage: runs/rule-questions.sh CORPUS OUTPUT}
if [ -d "$output" ]; then exit; fi
python -m compressor questions --config configs/corpora/arxivqa-rules.yaml --source "$corpus" --sample.train 25000 --output "$output"

#!/usr/bin/env bash
# Cloze questions that rules make from the abstracts of a corpus, for training base and compressor; made once.
#   runs/rule-questions.sh CORPUS OUTPUT
set -euo pipefail
cd "$(dirname "$0")/.."
corpus=${1:?usage: runs/rule-questions.sh CORPUS OUTPUT} output=${2:?usage: runs/rule-questions.sh CORPUS OUTPUT}
source runs/made-from.sh
from=("$corpus" configs/corpora/arxivqa-rules.yaml 25000)
if made_from "$output" "${from[@]}"; then exit; fi
python -m compressor questions --config configs/corpora/arxivqa-rules.yaml --source "$corpus" --sample.train 25000 --output "$output"
stamp "$output" "${from[@]}"

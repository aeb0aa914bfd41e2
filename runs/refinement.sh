#!/usr/bin/env bash
# What gradient steps on each memory, for its passage alone, bring: results/refinement/STEPS-steps-LENGTH.json;
# with FROM=random from random vectors.
#   runs/refinement.sh STEPS LIMIT LENGTH...
# The figures come from: runs/refinement.sh "5 10 20 50" 100 96; runs/refinement.sh 20 40 192 480;
# runs/refinement.sh 20 20 288 384; TOKENS=4 runs/refinement.sh 50 20 480; FROM=random runs/refinement.sh "20 50" 40 96;
# python benchmarks/refinement.py --output results/refinement/seconds.json
set -euo pipefail
cd "$(dirname "$0")/.."
steps=${1:?usage: runs/refinement.sh STEPS LIMIT LENGTH...} limit=${2:?} lengths=("${@:3}")
mkdir -p results/refinement
source runs/work.sh
for count in $steps; do
  for length in "${lengths[@]}"; do
    name=${FROM:+$FROM-}$count-steps-$length
    python evaluate.py --checkpoint models/arxiv-mini/compressor --task regeneration --data arxiv-test --tokens ${TOKENS:-16 4 1} \
      --lengths "$length" --limit "$limit" --batch_size 20 --refine_steps "$count" --refine_keep 0 \
      --refine_from "${FROM:-encoder}" --resume --output "$work/$name"
    cp "$work/$name/metrics.json" "results/refinement/$name.json"
  done
done
python runs/readme.py
finished

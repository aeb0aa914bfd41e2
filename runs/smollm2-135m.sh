#!/usr/bin/env bash
# Trains the compressor of SmolLM2-135M-Instruct and its bounds, writes them to models/smollm2-135m and measures them.
#   runs/smollm2-135m.sh CORPUS QUESTIONS [OPTIONS OF train.py]
# CORPUS: folder or file of abstracts. QUESTIONS: SQuAD's training part. A run that was stopped goes on when called again.
set -euo pipefail
cd "$(dirname "$0")/.."
corpus=${1:?usage: runs/smollm2-135m.sh CORPUS QUESTIONS [OPTIONS OF train.py]} questions=${2:?QUESTIONS is missing}
shift 2
output=outputs/smollm2-135m results=results/smollm2-135m
mkdir -p "$results"
python -m compressor.commands.cli fetch smollm2-135m
train() { # config, name, options
  local config=$1 name=$2
  shift 2
  # One that is done ends at once, or with an error if it was made from other data.
  python train.py --config "configs/smollm2-135m/$config.yaml" --output "$output/$name" --data.train "[$corpus]" \
    --data.validation "[$corpus]" --training.resume true "$@"
  [ -d "$output/$name/final" ] # a run that a signal stopped ends well too
  cp "$output/$name/log.jsonl" "$results/$name-log.jsonl"
  cp "$output/$name/run.json" "$results/$name-run.json"
}
train regenerate regenerate "$@"
train answer answer --data.questions "[$questions]" "$@"
train cued cued --data.questions "[$questions]" "$@"
# Once more with other batches, from a third of the rate that cost regeneration before.
train cued low --data.questions "[$questions]" --init "$output/cued/final" --seed 5 --training.learning-rate 6e-4 \
  --training.steps 1280 --training.decay-steps 1240 "$@"
train cued again --data.questions "[$questions]" --init "$output/low/final" --seed 7 --training.learning-rate 8e-4 \
  --training.steps 562 --training.decay-steps 1760 "$@"
train together together --data.questions "[$questions]" "$@"
# On at a rate that hardly falls; what is kept is the mean of the weights.
train together average --data.questions "[$questions]" --init "$output/together/final" --seed 9 --training.learning-rate 6.5e-4 \
  --training.steps 1100 --training.decay-steps 0 --training.average-from 100 "$@"
# Questions of the memories of up to eight passages, which takes larger batches.
train together eight --data.questions "[$questions]" --init "$output/average/final" --seed 11 --data.passages-together 8 \
  --training.batch-tokens 800 --training.learning-rate 6.5e-4 --training.steps 1140 --training.decay-steps 0 \
  --training.average-from 60 "$@"
train tuned full-tuned --data.questions "[$questions]" "$@"
train tuned none-tuned --data.questions "[$questions]" --compressor.method none-tuned "$@"
for pair in eight:compressor full-tuned:full-tuned none-tuned:none-tuned; do
  python -c 'import sys, torch; from compressor import Compressor
Compressor.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2], dtype=torch.bfloat16)' \
    "$output/${pair%:*}/final" "models/smollm2-135m/${pair#*:}"
done
runs/evaluate-smollm2-135m.sh

#!/usr/bin/env bash
# Trains every rival method and ours on the bundled base: first to regenerate, then to answer, from the same passages in the
# same order, one after the other on one core; and compares them in one table.
#   runs/methods.sh CORPUS_TRAIN CORPUS_VALIDATION QUESTIONS OUTPUT
# CORPUS_*: folder, file or shipped name of abstracts; QUESTIONS: sources of questions, separated by commas.
# reference-500x, the published recipe, keeps its own optimiser and objective; it reads 500 tokens for every passage, and gets
# fewer passages for that: about as many minutes as the others.
set -euo pipefail
cd "$(dirname "$0")/.."
train=${1:-arxiv-train} validation=${2:-arxiv-validation} questions=${3:-arxivqa-train} output=${4:-outputs/arxiv-mini/methods}

run() { # FOLDER, then settings; what a run from the same data has done is not done again
  local folder=$output/$1; shift
  local resume=false
  if [ -d "$folder/checkpoints" ]; then resume=true; fi
  python train.py --config configs/arxiv-mini/methods.yaml --data.train "[$train]" --data.validation "[$validation]" \
    --training.threads 1 --training.resume "$resume" --output "$folder" "$@"
  [ -d "$folder/final" ] # a run that a signal stopped ends well too
}
method() { # NAME, then settings of its own
  local name=$1; shift
  run "$name-regenerate" --compressor.method "$name" "$@"
}
answer() { # NAME, then settings of its own
  local name=$1; shift
  run "$name-answer" --stage answer --init "$output/$name-regenerate/final" --data.questions "[$questions]" \
    --training.steps 100 --training.decay_steps 60 --training.warmup_steps 10 --training.learning_rate 1.5e-3 \
    --objective.continuation 0.3 --training.validate_every 100 "$@"
  python -c 'import sys, torch; from compressor import Compressor
Compressor.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2], torch.bfloat16)' "$output/$name-answer/final" "models/arxiv-mini/methods/$name"
  mkdir -p results/methods
  for stage in regenerate answer; do cp "$output/$name-$stage/log.jsonl" "results/methods/$name-$stage.jsonl"; done
}

method kv --compressor.layout nested
answer kv
method icae --compressor.layout after --compressor.passage_attention causal
answer icae
method anchor --compressor.layout spread
answer anchor
method mean-pool --compressor.layout spread
answer mean-pool
published=(--training.optimizer adamw --training.batch_passages 4 --training.batch_tokens 2000
  --objective.continuation 0 --objective.tokens '[{"tokens": 16}]')
method reference-500x --compressor.layout published --compressor.passage_attention causal \
  --compressor.lora_targets '["q_proj", "v_proj"]' --compressor.lora_alpha 16 --compressor.initialisation normal \
  --training.steps 350 --training.decay_steps 210 --training.warmup_steps 30 --training.learning_rate 3e-3 \
  --data.validation_limit 16 "${published[@]}"
answer reference-500x --training.steps 88 --training.decay_steps 52 --data.validation_limit 16 "${published[@]}"
two=(--objective.tokens '[{"tokens": 4, "weight": 2}, {"tokens": 1}]')
method sentence-embedding --compressor.layout front --compressor.memory_tokens 4 "${two[@]}"
answer sentence-embedding "${two[@]}"

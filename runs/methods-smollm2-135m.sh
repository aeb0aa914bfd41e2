#!/usr/bin/env bash
# Rival methods and ours on SmolLM2-135M-Instruct after the same short training, about ten minutes of a core each:
# results/smollm2-135m/methods*.json and the table in docs/evaluating.md. What is done already is not done again.
#   runs/methods-smollm2-135m.sh CORPUS QUESTIONS [PASSAGES [STEPS [FOLDER]]]
# CORPUS: folder, file or shipped name of abstracts. QUESTIONS: SQuAD's training part. STEPS: fewer, to try it. FOLDER: of
# runs/qa-sets.sh, for ours and ICAE on sets that nothing was trained on (methods-qa-sets.json).
# reference-500x, the published recipe, keeps its own optimiser, objective and batches; it reads 500 tokens for every
# passage, and gets fewer passages for that: about as many minutes as the others.
set -euo pipefail
cd "$(dirname "$0")/.."
corpus=${1:?usage: runs/methods-smollm2-135m.sh CORPUS QUESTIONS [PASSAGES [STEPS]]} questions=${2:?QUESTIONS is missing}
limit=${3:-30} steps=${4:-110} folder=${5:-} output=outputs/smollm2-135m/methods results=results/smollm2-135m
mkdir -p "$results/methods"
python -m compressor.commands.cli fetch smollm2-135m
method() { # NAME, then settings of its own
  local name=$1; shift
  local resume=false
  if [ -d "$output/$name/checkpoints" ]; then resume=true; fi
  python train.py --config configs/smollm2-135m/methods.yaml --data.train "[$corpus]" --data.validation "[$corpus]" \
    --data.questions "[$questions]" --training.threads 1 --training.resume "$resume" --output "$output/$name" \
    --training.steps "$steps" --training.decay_steps $((steps * 9 / 11)) --training.validate_every "$steps" \
    --compressor.method "$name" "$@"
  [ -d "$output/$name/final" ] # a run that a signal stopped ends well too
  cp "$output/$name/log.jsonl" "$results/methods/$name.jsonl"
}
method kv
method icae --compressor.layout after --compressor.passage_attention causal
method mean-pool --compressor.layout spread
few=$(((steps + 3) / 4))
method reference-500x --compressor.layout published --compressor.passage_attention causal --compressor.writer_rank 0 \
  --compressor.lora_targets '["q_proj", "v_proj"]' --compressor.lora_alpha 16 --compressor.initialisation normal \
  --training.steps "$few" --training.decay_steps $((few * 9 / 11)) --training.validate_every "$few" --training.warmup_steps 4 \
  --training.optimizer adamw --training.learning_rate 3e-3 --training.batch_passages 4 --training.batch_tokens 2000 \
  --objective.tokens '[{"tokens": 16}]'
methods=()
for name in kv icae mean-pool reference-500x; do methods+=("$name=$output/$name/final"); done
common=(--checkpoint "$output/kv/final" --methods "${methods[@]}" --limit "$limit" --batch_size "$limit" --tokens 16 4)
python evaluate.py "${common[@]}" --task regeneration --data arxiv-test --lengths 48 --resume --output "$output/regeneration"
python evaluate.py "${common[@]}" --task qa --data squad-dev --question_tokens 72 --resume --output "$output/qa"
cp "$output/regeneration/metrics.json" "$results/methods-regeneration.json"
cp "$output/qa/metrics.json" "$results/methods.json"
if [ -n "$folder" ]; then
  python evaluate.py --checkpoint "$output/kv/final" --dtype auto --task qa --limit 40 --batch_size 20 --tokens 16 4 \
    --methods "kv=$output/kv/final" "icae=$output/icae/final" --question_tokens 96 --resume --output "$output/qa-sets" \
    --data "$folder"/{nq-dev,sleepqa-test,policyqa-test}.jsonl.gz
  cp "$output/qa-sets/metrics.json" "$results/methods-qa-sets.json"
fi
python runs/readme.py

#!/usr/bin/env bash
# What training with rounded memories is worth: the bundled compressor trained on for a few hundred steps with its memories
# rounded to 2 bits (straight-through), and for as many without; both measured under the same codecs:
# results/quantisation-aware/{rounded,plain}.json. Needs the codecs extra. About a quarter of an hour on one core.
#   runs/quantisation-aware.sh [CORPUS_TRAIN [STEPS [LIMIT]]]
set -euo pipefail
cd "$(dirname "$0")/.."
train=${1:-arxiv-train} steps=${2:-200} limit=${3:-60} output=outputs/arxiv-mini/quantisation-aware
mkdir -p results/quantisation-aware "$output"
calibration=$output/bundled.safetensors
python -m compressor.cli calibrate arxiv-train -o "$calibration" --limit 600 --overwrite
for name in rounded plain; do
  extra=()
  if [ "$name" = rounded ]; then extra=(--objective.codec int2 --objective.calibration "$calibration"); fi
  if [ ! -d "$output/$name/final" ]; then
    python train.py --config configs/arxiv-mini/regenerate.yaml --init models/arxiv-mini/compressor --data.train "[$train]" \
      --data.curriculum_passages 0 --data.lengths '[{"low": 64, "high": 128}]' --data.validation_limit 32 \
      --objective.tokens '[{"tokens": 16, "weight": 3}, {"tokens": 4}]' --training.optimizer muon --training.learning_rate 5e-4 \
      --training.steps "$steps" --training.warmup_steps 10 --training.decay_steps "$((steps * 3 / 4))" \
      --training.validate_every "$steps" --output "$output/$name" "${extra[@]}"
  fi
  python -m compressor.cli calibrate arxiv-train --checkpoint "$output/$name/final" -o "$output/$name.safetensors" --limit 600 --overwrite
  python benchmarks/codecs.py --checkpoint "$output/$name/final" --calibration "$output/$name.safetensors" --data arxiv-test \
    --lengths 96 --tokens 16 4 --limit "$limit" --codecs 'int3+ans, calibrated' 'int2+ans, calibrated' lowrank:0.1 lowrank:0.07 \
    --output "results/quantisation-aware/$name.json"
done

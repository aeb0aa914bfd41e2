#!/usr/bin/env bash
# Measures the memory codecs: bits a value and bytes a passage against ROUGE-L. Fits the calibration on the shipped
# training excerpt, measures on unseen abstracts. Needs the codecs extra. About half an hour of a core for SmolLM2.
#   runs/codecs.sh                  SmolLM2-135M's compressor
#   runs/codecs.sh arxiv-mini 60    arxiv-mini's, 60 passages
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:-smollm2-135m}
output=results/$name/codecs.json
[ "$name" != arxiv-mini ] || output=results/codecs.json
calibration=outputs/calibration-$name.safetensors
mkdir -p outputs
python -m compressor calibrate --checkpoint "models/$name/compressor" --data arxiv-train --limit 400 \
  --base-dtype auto --output "$calibration" --overwrite
python benchmarks/codecs.py --checkpoint "models/$name/compressor" --calibration "$calibration" --data arxiv-test \
  --lengths 96 --tokens 16 4 --limit "${2:-30}" --dtype auto --output "$output"

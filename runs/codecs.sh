#!/usr/bin/env bash
# Measures the memory codecs: bits a value and bytes a passage against ROUGE-L. Fits the calibration on the shipped
# training excerpt, measures on unseen abstracts. Needs the codecs extra. About a quarter of an hour on
# one core.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p outputs
python -m compressor calibrate arxiv-train -o outputs/calibration.safetensors --limit 600 --overwrite
python benchmarks/codecs.py --calibration outputs/calibration.safetensors --data arxiv-test \
  --lengths 96 --tokens 16 4 --limit "${1:-60}" --output results/codecs.json

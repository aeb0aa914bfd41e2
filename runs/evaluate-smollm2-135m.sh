#!/usr/bin/env bash
# Measures the bundled compressor of SmolLM2-135M-Instruct: results/smollm2-135m/, and the README's part about it.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p outputs results/smollm2-135m
work=$(mktemp -d outputs/run.XXXXXX)
trap 'rm -rf "$work"' EXIT
python evaluate.py --checkpoint models/smollm2-135m/compressor --task regeneration --data arxiv-test \
  --tokens 16 4 1 --lengths 48 96 192 --limit 40 --batch_size 40 --output "$work/regeneration"
cp "$work/regeneration/metrics.json" results/smollm2-135m/regeneration.json
python runs/readme.py

#!/usr/bin/env bash
# Every way of storing a text on the same unseen passages, bytes against what comes back: results/rate-distortion.json and
# .png. Needs the extras codecs and keywords. About ten minutes on one core.
#   runs/rate-distortion.sh [CALIBRATION]   a calibration of runs/codecs.sh; by default one is fitted on arxiv-train
# A sentence-embedding checkpoint at models/arxiv-mini/methods/sentence-embedding (runs/methods.sh) is taken along.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p outputs
work=$(mktemp -d outputs/run.XXXXXX)
trap 'rm -rf "$work"' EXIT
python evaluate.py --checkpoint models/arxiv-mini/compressor --task rate-distortion --data arxiv-test --lengths 96 \
  --questions arxivqa-test --question_tokens 96 \
  --tokens 16 4 1 --codecs bf16 int4+ans lowrank:0.3 lowrank:0.15 lowrank:0.07 --limit "${2:-20}" \
  ${1:+--calibration "$1"} --output "$work/rate-distortion"
mkdir -p results
cp "$work/rate-distortion/metrics.json" results/rate-distortion.json
cp "$work/rate-distortion/table.md" results/rate-distortion.md
cp "$work/rate-distortion/rate-distortion.png" results/rate-distortion.png

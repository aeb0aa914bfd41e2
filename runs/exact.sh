#!/usr/bin/env bash
# Measures exact regeneration: bytes of the residual against memory tokens, memory and residual against plain lossless
# coding: results/exact.json. Needs the codecs extra. About ten minutes on one core.
#   runs/exact.sh [CALIBRATION [LIMIT]]   a calibration of runs/codecs.sh; by default one is fitted on arxiv-train
set -euo pipefail
cd "$(dirname "$0")/.."
python benchmarks/exact.py --data arxiv-test --lengths 96 --tokens 16 8 4 2 1 --limit "${2:-20}" \
  ${1:+--calibration "$1"} --output results/exact.json

#!/usr/bin/env bash
# What gradient steps on a memory do to the answers read from it: results/smollm2-135m/refined-answers.json, docs/memories.md.
#   runs/refined-answers.sh [OPTIONS of benchmarks/refined_answers.py]
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p results/smollm2-135m
python benchmarks/refined_answers.py --output results/smollm2-135m/refined-answers.json "$@"

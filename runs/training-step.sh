#!/usr/bin/env bash
# What a training step of SmolLM2-135M costs beside the published recipe: results/benchmark-training-step.json,
# benchmark-training-step-avx2.json and their table.
#   runs/training-step.sh
# PASSAGES sets how many, REPEATS how often; OMP_NUM_THREADS the threads. Some twenty minutes of a core with AMX.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} THP_MEM_ALLOC_ENABLE=1
python benchmarks/training_step.py --base smollm2-135m --passages "${PASSAGES:-8}" --repeats "${REPEATS:-3}" \
  --threads "$OMP_NUM_THREADS" --memory --at 48 96 192 480 --output results/benchmark-training-step.json
# As on a processor with AVX2 alone, where float32 is the type to train in.
ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/training_step.py \
  --base smollm2-135m --passages "${PASSAGES:-8}" --repeats "${REPEATS:-3}" --threads "$OMP_NUM_THREADS" --dtype float32 \
  --variants ours "published recipe" --output results/benchmark-training-step-avx2.json
python runs/readme.py

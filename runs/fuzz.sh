#!/usr/bin/env bash
# Reads 100,000 damaged and forged memory files: none may crash, hang, or be taken for a memory it is not. Two minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
python benchmarks/fuzz_memory.py --files 105000 --seed "${1:-0}"

#!/usr/bin/env bash
# The store on SmolLM2: what 1 to 8 memories together answer, codecs, indexing, recall: results/smollm2-135m/store.json; and
# the index alone with a million vectors: results/store-index.json. DATA: questions with their paragraphs, as squad-dev and nq-dev.
#   runs/store.sh [DATA...]
# INDEXED names questions whose paragraphs are indexed instead, as squad-train.jsonl.gz.
set -euo pipefail
cd "$(dirname "$0")/.."
compressor fetch smollm2-135m
compressor fetch all-minilm-l6-v2
[ $# -gt 0 ] || set -- data/squad-dev.parquet
python benchmarks/store_answers.py --data "$@" --output results/smollm2-135m/store.json ${INDEXED:+--indexing-data "$INDEXED"}
python benchmarks/store_index.py
python runs/readme.py

#!/usr/bin/env bash
# The store: what is found (shipped SQuAD paragraphs), and the index alone with a million vectors; results/store-*.json.
#   runs/store.sh [DATA.parquet]
set -euo pipefail
cd "$(dirname "$0")/.."
compressor fetch all-minilm-l6-v2
python benchmarks/store_recall.py --data "${1:-data/squad-dev.parquet}"
python benchmarks/store_index.py

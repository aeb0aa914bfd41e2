#!/usr/bin/env bash
# Builds the small sets in data/: data/arxiv-{train,validation,test}.parquet, the questions about them that rules write
# (data/arxivqa-{train,test}.parquet), and data/squad-dev.parquet.
#   runs/sample-data.sh SOURCE [SQUAD_DEV]
# SOURCE is arXiv's snapshot, or a folder or glob of Parquet files with id, title, abstract, categories, date.
# SQUAD_DEV is dev-v1.1.json of https://rajpurkar.github.io/SQuAD-explorer/; without it squad-dev stays as it is.
# The same source gives the same records: they are drawn by a hash of seed and id.
set -euo pipefail
source=${1:?usage: runs/sample-data.sh SOURCE [SQUAD_DEV]}
squad=${2:-}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python -m compressor corpus --config "$root/configs/corpora/arxiv-2026.yaml" \
  --source "$source" --output "$work/sample" --name arxiv-sample \
  --sample.train 2000 --sample.validation 300 --sample.test 500 --sample.balance '[test]' --sample.seed 0
for split in train validation test; do
  cp "$work/sample/$split-00000-of-00001.parquet" "$root/data/arxiv-$split.parquet"
done
cat "$work/sample/manifest.json"
python -m compressor questions --config "$root/configs/corpora/arxivqa-rules.yaml" \
  --source "[$root/data/arxiv-train.parquet,$root/data/arxiv-test.parquet]" --output "$work/questions"
for split in train test; do
  cp "$work/questions/$split.parquet" "$root/data/arxivqa-$split.parquet"
done
if [[ -n $squad ]]; then
  python "$root/runs/sample-questions.py" "$squad" "$root/data/squad-dev.parquet"
fi

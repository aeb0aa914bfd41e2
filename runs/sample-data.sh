#!/usr/bin/env bash
# Builds the small sets in data/: data/arxiv-{train,validation,test}.parquet.
#   runs/sample-data.sh SOURCE
# SOURCE is arXiv's snapshot, or a folder or glob of Parquet files with id, title, abstract, categories, date.
# The same source gives the same records: they are drawn by a hash of seed and id.
set -euo pipefail
source=${1:?usage: runs/sample-data.sh SOURCE}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python -m compressor.cli corpus --config "$root/configs/corpora/arxiv-2026.yaml" \
  --source "$source" --output "$work/sample" --name arxiv-sample \
  --sample.train 2000 --sample.validation 300 --sample.test 500 --sample.balance '[test]' --sample.seed 0
for split in train validation test; do
  cp "$work/sample/$split-00000-of-00001.parquet" "$root/data/arxiv-$split.parquet"
done
cat "$work/sample/manifest.json"

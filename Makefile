# `make demo` and `make test` need only Python (3.11-3.13) and make: they create .venv with the pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow check base lint types train-mini readme clean

demo: base
	$(BIN)/python demo.py

test: base
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

# Those that take minutes each: wheel, notebooks, page, servers, many processes.
test-slow: base
	$(BIN)/python -m pytest -m "slow and not gpu"

# Before a commit: lint, types, and the tests of the modules that differ from main.
check: lint types
	@tests="$$($(BIN)/python tests/affected.py)"; \
	  [ -z "$$tests" ] || $(BIN)/python -m pytest --numprocesses auto --dist worksteal $$tests

# SmolLM2-135M-Instruct: downloaded and converted once, a second from then on. What it cannot get it says in a line.
base: $(READY)
	@$(BIN)/compressor fetch smollm2-135m || true

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# Under ten minutes on a CPU core with bfloat16 instructions, a quarter of an hour on two without: a fresh compressor for the bundled base, trained on the shipped abstracts.
train-mini: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" runs/train-mini.sh

readme: $(READY)
	$(BIN)/python runs/readme.py

clean:
	rm -rf $(VENV) outputs

# torch comes first, alone: TORCH_INDEX chooses its build (`make TORCH_INDEX=https://download.pytorch.org/whl/cpu demo` saves
# the gigabytes of CUDA packages on Linux), and what depends on torch then takes it as it is.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "error: $$($(PYTHON) --version) is not among 3.11-3.13, which constraints.txt is for: make PYTHON=python3.12"; exit 2; }
	@echo "Installing into $(VENV): some minutes, once; pip prints nothing until it is done. torch is the largest part."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

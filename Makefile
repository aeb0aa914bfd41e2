# `make demo` and `make test` need only Python (3.11-3.13) and make: they create .venv with the pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint types train-mini readme clean

demo: $(READY)
	$(BIN)/python demo.py

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# Under ten minutes on one or two CPU cores: a fresh compressor for the bundled base, trained on the shipped abstracts.
train-mini: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" runs/train-mini.sh

readme: $(READY)
	$(BIN)/python runs/readme.py

clean:
	rm -rf $(VENV) outputs

# torch comes first and alone: its CPU build has no CUDA packages, and what depends on torch then takes it as it is.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

# Every target sets up its own environment first; nothing but Python 3.11 and a C++ compiler is needed.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
KERNELS := $(shell find src/larosa/ops/cpu/csrc -type f)

.PHONY: demo test lint types format clean

demo: $(READY)
	$(BIN)/larosa demo

test: $(READY)
	$(BIN)/python -m pytest -n auto --cov --cov-report=term --cov-fail-under=90

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The torch version is pinned for development alone: a bare `torch` can pull gigabytes of CUDA packages.
$(READY): pyproject.toml $(KERNELS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage demo.png

# Every target sets up its own environment first; nothing but Python 3.11 and a C++ compiler is needed.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
KERNELS := $(shell find src/larosa/ops/cpu/csrc -type f)

# Each core has its own stretch of the tests, so that what a file's tests share is made once; who is done early takes some over.
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal --cov --cov-report=term --cov-fail-under=90

.PHONY: demo test test-all lint types format docs clean

demo: $(READY)
	$(BIN)/larosa demo

test: $(READY)
	$(PYTEST) -m "not slow"

test-all: $(READY)
	$(PYTEST) --hypothesis-profile=thorough

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The torch version is pinned for development alone: a bare `torch` can pull gigabytes of CUDA packages.
$(READY): pyproject.toml $(KERNELS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage demo.png

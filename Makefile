# `make demo` and `make test` need Python 3.10 or newer and nothing else; each makes its own environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint bench train clean

$(VENV)/demo.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	@touch $@

$(VENV)/dev.done: $(VENV)/demo.done
	$(PIP) -e '.[dev,bench]'
	@touch $@

demo: $(VENV)/demo.done  ## patch the shipped model's states and draw where it keeps a value it never writes
	$(BIN)/python -m analyses.hidden_reasoning demo

test: $(VENV)/dev.done  ## lint, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

lint: $(VENV)/dev.done  ## mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/dev.done  ## time and memory beside HF transformers and mambapy, one thread
	$(BIN)/python -m analyses.benchmarks cpu

train: $(VENV)/dev.done  ## train the shipped model again
	$(BIN)/python -m analyses.hidden_reasoning train --out runs/masked

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

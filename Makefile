# `make demo` and `make test` need Python 3.10 or newer and nothing else; each makes its own environment.
PYTHON ?= python3
VENV ?= .venv
KERNELS ?= .venv-kernels
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-kernels lint bench train clean

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

# mamba-ssm's own code without CUDA: transformers would bind it, so it has an environment of its own
$(KERNELS)/done: tests/kernels/environment.sh constraints.txt
	PYTHON=$(PYTHON) bash tests/kernels/environment.sh $(KERNELS)
	@touch $@

test: $(VENV)/dev.done $(KERNELS)/done  ## lint, types, tests; and the bridge on mamba-ssm's own code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(KERNELS)/bin/python -m pytest -n 2 tests/kernels
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-kernels: $(KERNELS)/done  ## the bridge on mamba-ssm's own code alone
	OMP_NUM_THREADS=1 $(KERNELS)/bin/python -m pytest -n 2 tests/kernels

lint: $(VENV)/dev.done  ## mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/dev.done  ## time and memory beside HF transformers and mambapy, one thread
	$(BIN)/python -m analyses.benchmarks cpu

train: $(VENV)/dev.done  ## train the shipped model again
	$(BIN)/python -m analyses.hidden_reasoning train --out runs/masked

clean:
	rm -rf $(VENV) $(KERNELS) .pytest_cache .mypy_cache .ruff_cache .hypothesis

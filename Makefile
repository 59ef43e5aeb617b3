# `make demo` and `make test` need Python 3.10 or newer and nothing else; each makes its own environment.
PYTHON ?= python3
VENV ?= .venv
KERNELS ?= .venv-kernels
PEERS ?= .venv-peers
GPU_PYTHON ?= $(BIN)/python
CHECKS := kernels_bridge/harness/results
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-kernels test-slow lint bench bench-peers train clean

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
$(KERNELS)/done: tests/kernels/environment.sh $(wildcard tests/kernels/cuda_on_cpu/*) constraints.txt
	PYTHON=$(PYTHON) bash tests/kernels/environment.sh $(KERNELS)
	@touch $@

test: $(VENV)/dev.done $(KERNELS)/done  ## lint, types, tests; and the bridge on mamba-ssm's own code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(KERNELS)/bin/python -m pytest -n 2 --dist worksteal tests/kernels
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-kernels: $(KERNELS)/done  ## the bridge on mamba-ssm's own code alone
	OMP_NUM_THREADS=1 $(KERNELS)/bin/python -m pytest -n 2 --dist worksteal tests/kernels

test-slow: $(VENV)/dev.done $(KERNELS)/done  ## more seeds, types and lengths
	OMP_NUM_THREADS=1 $(KERNELS)/bin/python -m pytest -n 2 --dist worksteal -m slow tests/kernels
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow

lint: $(VENV)/dev.done  ## mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/dev.done  ## time and memory, beside the peers of `make bench-peers` where they are
	$(BIN)/python -m analyses.benchmarks all

bench-peers:  ## TransformerLens, nnsight, mambapy and MambaLens, in environments of their own
	for name in peers lens; do \
	  $(PYTHON) -m venv $(PEERS)/$$name; \
	  $(PEERS)/$$name/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0; \
	  $(PEERS)/$$name/bin/python -m pip install --quiet --disable-pip-version-check -r analyses/benchmarks/$$name.txt; \
	done

# On a machine with CUDA, mamba-ssm and causal-conv1d: `make -k gpu GPU_PYTHON=python3`, which goes on past what fails. A
# check that was interrupted goes on where it was; each step can be made alone, as in `make fused-130m`. The readable
# model takes a token at a time: of the checks, those of long rows take nine tenths of the time, and come last.
SHORT := 1,2,3,4,5,17,127,128,129,255,372
LONG := 1023,1134,2047,2048,2049,4097
CHECK = $(GPU_PYTHON) -m kernels_bridge check --device cuda --json $(CHECKS)/$@.json --target
FUSED := fused-float32 fused-bfloat16 fused-float16 fused-odd fused-falcon fused-masked fused-130m
LONG_ROWS := long-float32 long-bfloat16 long-float16 long-odd
GPU := gpu-tests gpu-golden $(FUSED) gpu-speed mamba_ssm-float32 $(LONG_ROWS)
.PHONY: gpu $(GPU)
gpu: $(GPU)  ## what only a GPU can show: tests, golden vectors of the kernels, the check, the speed

gpu-tests:  # the files that have such tests alone; torch's warnings on a GPU are shown, and fail none
	$(GPU_PYTHON) -m pytest -m gpu -W default $(shell grep -rl --include='*.py' 'mark\.gpu' tests/kernels_bridge)

gpu-golden:
	$(GPU_PYTHON) -m kernels_bridge record kernels_bridge/fused/golden.safetensors

fused-float32 fused-bfloat16 fused-float16: fused-%:
	$(CHECK) fused --dtype $* --lengths $(SHORT)

fused-odd fused-falcon: fused-%:
	$(CHECK) fused --size $* --lengths $(SHORT)

long-float32 long-bfloat16 long-float16: long-%:
	$(CHECK) fused --dtype $* --lengths $(LONG)

long-odd:
	$(CHECK) fused --size odd --lengths $(LONG)

fused-130m:
	$(CHECK) fused --size 130m

fused-masked:
	$(CHECK) fused --model analyses/hidden_reasoning/models/masked --lengths 5,17,64

gpu-speed:
	$(GPU_PYTHON) -m analyses.benchmarks gpu

mamba_ssm-float32:  ## fails in decoding, by its softplus, and at 2049 and 4097 tokens, by causal-conv1d's own backward
	$(CHECK) mamba_ssm --lengths $(SHORT),2049,4097

train: $(VENV)/dev.done  ## train the shipped model again
	$(BIN)/python -m analyses.hidden_reasoning train --out runs/masked

clean:
	rm -rf $(VENV) $(KERNELS) $(PEERS) .pytest_cache .mypy_cache .ruff_cache .hypothesis

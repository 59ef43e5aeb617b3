#!/usr/bin/env bash
# The second environment, in the folder that is given: mamba-ssm and causal-conv1d without CUDA, beside Triton, on a CPU.
# Their declared dependencies (tilelang, quack: Mamba-3 only) are left out, and their build must see torch, hence the flags.
set -euo pipefail
venv=$1
here=$(cd "$(dirname "$0")" && pwd)
${PYTHON:-python3} -m venv "$venv"
pip() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$here/../../constraints.txt" "$@"; }
pip torch
pip triton==3.7.1 transformers einops safetensors tqdm typer pytest pytest-xdist hypothesis ninja==1.13.2 wheel==0.48.0 setuptools==81.0.0
MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE \
  pip --no-build-isolation --no-deps mamba-ssm==2.3.2.post1 causal-conv1d==1.7.0

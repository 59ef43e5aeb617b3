#!/usr/bin/env bash
# The second environment, in the folder that is given: mamba-ssm and causal-conv1d without CUDA, beside Triton, on a CPU.
# Their declared dependencies (tilelang, quack: Mamba-3 only) are left out, and their build must see torch, hence the flags.
# Their CUDA kernels are compiled for the CPU where there is a C++ compiler; where not, the tests run on references.
set -euo pipefail
venv=$1
here=$(cd "$(dirname "$0")" && pwd)
${PYTHON:-python3} -m venv "$venv"
pip() { "$venv/bin/python" -m pip "$1" --quiet --disable-pip-version-check -c "$here/../../constraints.txt" "${@:2}"; }
pip install torch
pip install triton==3.7.1 transformers einops safetensors tqdm typer matplotlib pytest pytest-xdist hypothesis ninja==1.13.2 wheel==0.48.0 setuptools==81.0.0
export MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE
sdists=(--no-build-isolation --no-deps --no-binary mamba-ssm,causal-conv1d)
pip download "${sdists[@]}" --dest "$venv/src" mamba-ssm==2.3.2.post1 causal-conv1d==1.7.0
pip install "${sdists[@]}" "$venv"/src/*.tar.gz
if ! PATH="$(cd "$venv/bin" && pwd):$PATH" "$venv/bin/python" "$here/cuda_on_cpu/build.py" "$venv/src" >"$venv/src/build.log" 2>&1; then
  echo "The CUDA kernels could not be compiled for the CPU (is there a C++ compiler? $venv/src/build.log); the tests run on the packages' references instead." >&2
fi

"""What a forward holds at once, and what a recording costs: measured in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import slow

from interp import run
from kernels_bridge.backends import BACKENDS
from minimal_mamba import Mamba, MambaConfig

ROOT = Path(__file__).parents[2]
HERE = ["reference", *(n for n in ("torch", "compiled") if not BACKENDS[n].missing(torch.device("cpu")))]
LENGTH, D_MODEL, N = 1024, 64, 128
TRAJECTORY = LENGTH * 2 * D_MODEL * N * 4  # bytes of (1, l, e, n) in float32: 64 MiB
HEAD = """
import sys, torch
from minimal_mamba import Mamba, MambaConfig, at
from interp import run

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

torch.set_num_threads(1)
torch.manual_seed(0)
"""
RECORDED = f"""
model = Mamba(MambaConfig(d_model={D_MODEL}, n_layer=2, vocab_size=50, d_state={N}))
ids = torch.randint(0, 50, (1, {LENGTH}))
with torch.no_grad():
    for _ in range(3):  # warm: the process has what a run line by line needs, and its heap has stopped creeping
        run(model, ids, record=[at.dt(layer=slice(None), pos=0)], backend=sys.argv[1])
    before = peak()
    for place in (at.ssm_state(layer=1, pos=1000), at.ssm_state(layer=1), at.ssm_state(layer=slice(None))):
        out = run(model, ids, record=[place], backend=sys.argv[1])
        print(peak() - before)
        assert out.records[place][..., -1].any()
        del out
"""
PLAIN = """
model = Mamba(MambaConfig(d_model=128, n_layer=4, vocab_size=8))
with torch.no_grad():
    run(model, torch.zeros(1, 5, dtype=torch.long), backend=sys.argv[1])
    before = peak()
    run(model, torch.zeros(8, 512, dtype=torch.long), backend=sys.argv[1])
    print(peak() - before)
"""
CHANNELS = 8 * 512 * 256 * 4  # bytes of (b, l, e)


def growth(script, backend):
    """What a script prints, bytes by which the peak of its process grows."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "16384",  # less than one state: else the heap's holes are measured, not its use
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", HEAD + script, backend],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return map(int, done.stdout.split())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("backend", [*HERE[1:], *slow("reference")])
def test_a_recording_costs_what_it_holds(backend):
    one, every, both = growth(RECORDED, backend)  # one position, all, all of both layers
    assert one < TRAJECTORY / 16
    assert every > TRAJECTORY * 0.9  # the measure sees a trajectory where there is one
    if backend != "reference":  # which keeps token by token, and puts that together
        assert every < TRAJECTORY * 1.1 and both < TRAJECTORY * 2.1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("backend", HERE[1:])
def test_a_forward_holds_few_tensors_at_once(backend):
    """Of (b, l, e): x and z, u, dt or what is made of y, y, and the scan's blocks; `compiled` goes piece by piece."""
    (most,) = growth(PLAIN, backend)
    least, bound = {"torch": (4, 8), "compiled": (1, 4)}[backend]
    assert least * CHANNELS < most < bound * CHANNELS


@pytest.mark.parametrize(("backend", "told"), [("torch", 2.0), ("compiled", 0.8)])
def test_what_a_run_keeps_for_its_backward_is_what_the_readme_says(backend, told):
    """Bytes a token of a layer as wide as mamba-130m's, times its 24 layers."""
    if backend not in HERE:
        pytest.skip("numba is not installed")
    kept = []
    for layers in (1, 2):
        model = Mamba(MambaConfig(d_model=768, n_layer=layers, vocab_size=8))
        weights, seen = {p.data_ptr() for p in model.parameters()}, {}

        def keep(tensor, seen=seen):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            held = run(model, torch.zeros(1, 256, dtype=torch.long), backend=backend)
        kept.append(sum(size for place, size in seen.items() if place not in weights))
        del held
    assert abs(24 * (kept[1] - kept[0]) / 256 / 1e6 - told) < 0.2

"""mamba-ssm's own test of the selective scan, its cases and tolerances restated, with `torch` in the kernel's place.

Source: tests/ops/test_selective_scan.py (mamba-ssm 2.3.2.post1): batch 2, dim 4, dstate 8, D, z and delta_bias present,
softplus, B and C that vary; reference there and here the plain recurrence. There one dtype, float32, is run.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels_bridge.torch_ops import TORCH
from minimal_mamba.scan import READABLE, Ops

RTOL, ATOL = 6e-4, 2e-3
RTOLW = 1e-3


def draw(l: int) -> dict[str, Tensor]:
    """Drawn as there: u, z, B, C normal, A = -rand / 2, delta = rand / 2, delta_bias = rand / 2 (channel-last here)."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    def uniform(*shape: int) -> Tensor:
        return 0.5 * torch.rand(shape, generator=rng)

    b, e, n = 2, 4, 8
    return {
        "A": -uniform(e, n), "B": normal(b, l, n), "C": normal(b, l, n), "D": normal(e), "z": normal(b, l, e),
        "delta_bias": uniform(e), "u": normal(b, l, e), "delta": uniform(b, l, e),
    }  # fmt: skip


def call(ops: Ops, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """selective_scan_fn of ours: softplus, skip and gate around a backend's scan."""
    dt = F.softplus(x["delta"] + x["delta_bias"])
    h = torch.zeros(2, *x["A"].shape, dtype=x["u"].dtype)
    y, last = ops.scan(x["u"], dt, x["A"], x["B"], x["C"], h)
    return (y + x["D"] * x["u"]) * F.silu(x["z"]), last


@pytest.mark.parametrize("l", [128, 256, 512, 1024, 2048, 4096, 372, 1134, 1, 5])
def test_torch_in_the_place_of_the_kernel(l: int) -> None:
    """Also the lengths that are commented out there, and short ones, which have none."""
    given, found = draw(l), {}
    w = torch.randn(2, l, 4, generator=torch.Generator().manual_seed(1))
    for name, ops in (("want", READABLE if l <= 512 else TORCH), ("got", TORCH)):
        dtype = torch.float64 if name == "want" else torch.float32
        x: dict[str, Any] = {key: t.detach().to(dtype).requires_grad_() for key, t in given.items()}
        out, last = call(ops, x)
        grads = torch.autograd.grad((out * w.to(dtype)).sum(), [*x.values()])
        found[name] = {"out": out, "last": last} | dict(zip(x, grads, strict=True))
    bounds = dict.fromkeys(("D", "z", "delta_bias"), (RTOLW, ATOL)) | {
        "out": (RTOL, ATOL), "last": (RTOL, ATOL), "u": (2 * RTOL, 2 * ATOL), "delta": (5 * RTOL, 10 * ATOL),
        "A": (RTOLW, 5 * ATOL), "B": (RTOL, ATOL), "C": (RTOL, ATOL),
    }  # fmt: skip
    for key, (rtol, atol) in bounds.items():
        got, want = found["got"][key].detach().double(), found["want"][key].detach()
        assert torch.allclose(got, want, rtol=rtol, atol=atol), key
        assert (got - want).norm() <= 1e-5 * want.norm(), key

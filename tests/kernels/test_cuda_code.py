"""The packages' CUDA code itself, compiled for the CPU (`cuda_on_cpu`), against the readable operations in float64."""

import dataclasses
from pathlib import Path

import causal_conv1d_cuda
import pytest
import selective_scan_cuda
import torch
from helpers import error
from torch import Tensor
from torch.nn import functional as F

from kernels_bridge.fused import golden, load
from kernels_bridge.torch_ops import selective_scan

KERNELS = dataclasses.replace(load(), device="cpu")
pytestmark = pytest.mark.skipif(
    not hasattr(selective_scan_cuda, "__file__"), reason="the kernels are not compiled here"
)


def test_what_a_gpu_will_be_asked_to_record(tmp_path: Path) -> None:
    """Every case of the golden vectors: the kernels at every length, type and width, some with gradients."""
    golden.record(tmp_path / "golden.safetensors", KERNELS)
    found = [*golden.replay(tmp_path / "golden.safetensors")]
    assert {case.l for case, *_ in found} == {*golden.LENGTHS}
    assert not [(case.name, quantity, e) for case, quantity, e, bound in found if not e <= bound]


@pytest.mark.parametrize("l", [5, 127, 128, 200, 256, 372, 512, 1023, 1024, 2047, 2048, 2049, 4096, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scan_with_all_that_it_fuses(l: int, dtype: torch.dtype) -> None:
    """Skip, gate, bias and softplus; each of the five sizes of a launch, and chunks of 2,048 tokens, both ways."""
    rng = torch.Generator().manual_seed(l)
    b, e, n = 2, 4, 3

    def draw(*size: int, t: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=rng).to(t)

    u, dt, z, g = (draw(b, e, l) for _ in range(4))
    B, C, D, bias = draw(b, 1, n, l), draw(b, 1, n, l), draw(e, t=torch.float32), draw(e, t=torch.float32)
    A = -draw(e, n, t=torch.float32).exp()
    given = [x.requires_grad_() for x in (u, dt, A, B, C, D, z, bias)]
    out, last = KERNELS.selective_scan_fn(*given, delta_softplus=True, return_last_state=True)
    exact = [x.detach().double().requires_grad_() for x in given]
    u, dt, A, B, C, D, z, bias = exact
    step = F.softplus(dt + bias[:, None])
    y, h = selective_scan(
        *(x.transpose(1, 2) for x in (u, step)), A, *(x[:, 0].transpose(1, 2) for x in (B, C)), A.new_zeros(b, e, n)
    )
    want = (y.transpose(1, 2) + D[:, None] * u) * F.silu(z)
    bound = 2e-6 if dtype == torch.float32 else 5e-3
    assert error(out, want) < bound and error(last, h) < 2e-6
    grads = zip(torch.autograd.grad(out, given, g), torch.autograd.grad(want, exact, g.double()), strict=True)
    assert all(error(a, w) < 2 * bound for a, w in grads)


def test_what_a_gpu_would_refuse() -> None:
    odd = torch.randn(2, 4, 132)[:, :, 1:129]
    A, B, C = -torch.ones(4, 3), *torch.randn(2, 2, 1, 3, 128)
    with pytest.raises(RuntimeError, match="misaligned address"):
        selective_scan_cuda.fwd(odd, odd, A, B, C, None, None, None, False)
    with pytest.raises(RuntimeError, match="misaligned address"):
        causal_conv1d_cuda.causal_conv1d_fwd(
            odd, torch.randn(4, 3), None, None, None, torch.empty(2, 4, 128), None, True
        )
    many = torch.ones(1, 2**16, 1)
    with pytest.raises(RuntimeError, match="invalid configuration argument"):
        selective_scan_cuda.fwd(many, many, -many[0], many[:, :1, None], many[:, :1, None], None, None, None, False)


def test_what_is_left_out_says_so() -> None:
    u = torch.ones(1, 8, 4)
    last = u.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(RuntimeError, match="not compiled here"):
        selective_scan_cuda.fwd(u, u, -u[0], u[0], u[0], None, None, None, False)
    with pytest.raises(RuntimeError, match="not compiled here"):
        causal_conv1d_cuda.causal_conv1d_fwd(last, u[0, :, :3], None, None, None, torch.empty_like(last), None, True)

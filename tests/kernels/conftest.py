"""The second environment: mamba-ssm and causal-conv1d as they are, without a GPU (`make test-kernels`).

Real are the packages' Python code, their autograd functions, their Triton kernels, in Triton's interpreter, and their
CUDA kernels, compiled for the CPU (`cuda_on_cpu`). Where there is no C++ compiler, or MAMBASCOPE_REFERENCES is set, the
CUDA kernels are stood in for, function by function, by the packages' own references and their gradients by autograd; a
last state's gradient is not among what they are asked for, as in the real ones. transformers binds mamba_ssm when it
is imported, so these tests run in a process and an environment of their own; elsewhere this folder is left out.
"""

import contextlib
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended import here as numbers_of
from torch import Tensor
from torch.nn import functional as F

EXTENSIONS = ("selective_scan_cuda", "causal_conv1d_cuda")


def here() -> bool:
    """Whether this is the second environment, which keeps the packages' sources."""
    return (Path(sys.prefix) / "src" / "build.log").exists() and importlib.util.find_spec("mamba_ssm") is not None


def compiled() -> bool:
    """Whether the kernels are the packages' own."""
    found = all(importlib.util.find_spec(name) for name in EXTENSIONS)
    return found and not os.environ.get("MAMBASCOPE_REFERENCES")


KERNELS = "the packages' CUDA code, compiled for the CPU" if compiled() else "the packages' Python references"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if here():
        terminalreporter.write_line(f"kernels: {KERNELS}")


def loadable(*given: Tensor | None, every: int) -> None:
    """Where l is a multiple of `every`, the kernels load 16 bytes at once: on a GPU a row that begins elsewhere is a
    "misaligned address"; a CPU reads it all the same, so it is asked for here.
    """
    for x in given:
        if x is not None and x.shape[-1] % every == 0:
            steps = [step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
            assert all(x.element_size() * s % 16 == 0 for s in steps) and x.data_ptr() % 16 == 0, "misaligned address"


def _even(l: int) -> int:
    """Tokens of one round of the scan's threads, of which a whole number is loaded without a guard."""
    return next((tokens for tokens in (128, 256, 512, 1024) if l <= tokens), 2048)


# -- selective_scan_cuda ----------------------------------------------------------------------------------------------


def scan_fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

    loadable(u, delta, B, C, z, every=_even(u.shape[2]))
    assert u.shape[1] < 2**16, "more channels than the grid of a launch has places"
    assert u.dtype == delta.dtype == B.dtype == C.dtype and A.dtype == torch.float32
    assert D is None or D.dtype == torch.float32
    assert delta_bias is None or delta_bias.dtype == torch.float32
    assert all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (u, delta, B, C))
    args = (u, delta, A, B, C, D)
    out, last = selective_scan_ref(*args, None, delta_bias, delta_softplus, return_last_state=True)
    x = torch.stack([torch.full_like(last, torch.nan), last], -1).flatten(-2)[:, :, None]  # (b, e, chunks, 2n)
    if z is None:
        return out, x
    return out, x, selective_scan_ref(*args, z, delta_bias, delta_softplus)


def scan_bwd(u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

    loadable(u, delta, B, C, z, dout, every=_even(u.shape[2]))
    given = (u, delta, A, B, C, D, z, delta_bias)
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().clone().requires_grad_() for t in given]
        found = selective_scan_ref(*leaves, delta_softplus)
        wanted = [leaf for leaf in leaves if leaf is not None]
        grads = iter(torch.autograd.grad(found, wanted, dout))
    du, ddelta, dA, dB, dC, dD, dz_new, dbias = [None if leaf is None else next(grads) for leaf in leaves]
    result = [du, ddelta, dA, dB, dC, dD, dbias]
    if z is not None:
        result.append(dz_new if dz is None else dz.copy_(dz_new))
        if recompute_out_z:
            result.append(found.detach())
    return result


# -- causal_conv1d_cuda -----------------------------------------------------------------------------------------------


def conv_fwd(x, weight, bias, seq_idx, initial_states, out, final_states_out, silu):
    assert seq_idx is None and initial_states is None and final_states_out is None
    loadable(x, out, every=16 // x.element_size())
    out.copy_(_conv(x, weight, bias, silu))


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    (_, e, _), k = x.shape, weight.shape[1]
    assert 2 <= k <= 4 and (x.stride(2) == 1 or (x.stride(1) == 1 and e % 8 == 0))
    y = F.conv1d(
        F.pad(x.float(), (k - 1, 0)), weight.float()[:, None], None if bias is None else bias.float(), groups=e
    )
    return (F.silu(y) if silu else y).to(x.dtype)


def conv_bwd(x, weight, bias, dout, seq_idx, initial_states, dfinal, dx, dweight, dbias, dinitial, silu):
    """By hand: torch's custom operators run below autograd. As the real one, it takes the tokens before a last chunk of
    less than 16 bytes for zeros where silu is on (`kernels._lengthened`).
    """
    l, k, whole = x.shape[2], weight.shape[1], 16 // x.element_size()
    loadable(x, dx, dout if dout.stride(2) == 1 else None, every=whole)  # else it is copied
    x, w, g = F.pad(x.float(), (k - 1, 0)), weight.float(), dout.float()
    if silu:
        seen = [x, x.clone()]
        start = l // (128 * whole) * 128 * whole
        if start and 0 < l - start < whole:
            seen[1][:, :, k - 1 + l - whole : k - 1 + start] = 0
        b = None if bias is None else bias.float()
        first, last = (F.conv1d(part, w[:, None], b, groups=len(w)) for part in seen)
        y = torch.cat([first[:, :, :start], last[:, :, start:]], 2)
        g = g * (y.sigmoid() * (1 + y * (1 - y.sigmoid())))
    dweight.copy_(torch.stack([(g * x[:, :, i : i + l]).sum((0, 2)) for i in range(k)], 1))
    if dbias is not None:
        dbias.copy_(g.sum((0, 2)))
    g = F.pad(g, (0, k - 1))
    dx.copy_(sum(w[:, i, None] * g[:, :, k - 1 - i : k - 1 - i + l] for i in range(k)))


def conv_update(x, conv_state, weight, bias, out, silu, cache_seqlens, indices):
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_update_ref

    assert cache_seqlens is None and indices is None and conv_state.dtype == x.dtype
    out.copy_(causal_conv1d_update_ref(x, conv_state, weight, bias, "silu" if silu else None))


def stand_in() -> None:
    scan, conv = (types.ModuleType(name) for name in EXTENSIONS)
    scan.fwd, scan.bwd = scan_fwd, scan_bwd  # type: ignore[attr-defined]
    conv.causal_conv1d_fwd, conv.causal_conv1d_bwd = conv_fwd, conv_bwd  # type: ignore[attr-defined]
    conv.causal_conv1d_update = conv_update  # type: ignore[attr-defined]
    sys.modules |= {"selective_scan_cuda": scan, "causal_conv1d_cuda": conv}


# -- Triton -----------------------------------------------------------------------------------------------------------


def interpret() -> None:
    """Let Triton's kernels run in its interpreter, without a device."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton
    from triton.runtime import interpreter

    class Device(contextlib.nullcontext):
        def __init__(self, *args: Any):
            super().__init__()

    torch.cuda.device = Device  # type: ignore[misc,assignment]
    torch.cuda.get_device_properties = lambda *a, **k: types.SimpleNamespace(multi_processor_count=2)  # type: ignore
    tuned = triton.autotune
    triton.autotune = lambda configs, key, **kw: tuned(configs=configs[:1], key=key, **kw)
    interpreter._unwrap_tensor = numbers_of


@pytest.fixture
def plain_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """mamba-ssm's own model with its references of the norms, which Triton's interpreter takes most of the time for."""
    from mamba_ssm.models import mixer_seq_simple
    from mamba_ssm.modules import block
    from mamba_ssm.ops.triton.layer_norm import layer_norm_ref, rms_norm_ref

    def norm(x: Tensor, weight: Tensor, bias: Tensor | None, is_rms_norm: bool, **named: Any) -> Any:
        named.pop("residual_in_fp32", None)  # everything is float32
        return (rms_norm_ref if is_rms_norm else layer_norm_ref)(x, weight, bias, **named)

    for module in (mixer_seq_simple, block):
        monkeypatch.setattr(module, "layer_norm_fn", norm)


torch.set_num_threads(1)
if here():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a torch that was built for CUDA does all on the CPU too
    if not compiled():
        stand_in()
    interpret()
else:
    collect_ignore_glob = ["*.py"]


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks of a quarter of the rows and decoded tokens, which is enough in float32: each of them costs."""
    module = importlib.import_module("kernels_bridge.harness.check")
    monkeypatch.setattr(module, "TOKENS", 32)
    monkeypatch.setattr(module, "DECODED", 9)  # twice the conv's window, and one; each is a step in the interpreter

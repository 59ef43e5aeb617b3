"""Stand-ins for the kernels, in their layout, on a CPU, in any type: they prove the plumbing around the kernels.

Each is strict where the C++ code is (types, strides, sizes), works in place where the kernel does, and leaves out of
its backward what the kernel's leaves out.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels_bridge.fused import Kernels


class Ignored(torch.autograd.Function):
    """A value that hangs on the graph, and whose gradient is dropped, as that of the kernel's last state."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, hook: Tensor) -> Tensor:
        ctx.shape = hook.shape
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, grad.new_zeros(ctx.shape)


def selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False,
) -> Any:  # fmt: skip
    """u, delta, z (b, e, l), A (e, n), B, C (b, n, l) or (b, groups, n, l)."""
    (b, e, l), n = u.shape, A.shape[1]
    assert delta.shape == u.shape and A.shape == (e, n) and n <= 256
    assert delta.dtype == u.dtype == B.dtype == C.dtype and A.dtype == (
        u.dtype if u.dtype == torch.float64 else torch.float32
    )
    B, C = (x if x.dim() == 4 else x[:, None] for x in (B, C))
    assert B.shape == C.shape == (b, B.shape[1], n, l) and e % B.shape[1] == 0
    w = A.dtype
    dt = delta.to(w) if delta_bias is None else delta.to(w) + delta_bias[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    B, C = (x.to(w).repeat_interleave(e // x.shape[1], 1) for x in (B, C))  # (b, e, n, l)
    h, ys = u.new_zeros(b, e, n, dtype=w), []
    for t in range(l):
        h = torch.exp(dt[:, :, t, None] * A) * h + (dt[:, :, t] * u[:, :, t].to(w))[..., None] * B[..., t]
        ys.append((h * C[..., t]).sum(-1))
    y = torch.stack(ys, 2)
    y = y if D is None else y + D[:, None] * u.to(w)
    y = (y if z is None else y * F.silu(z.to(w))).to(u.dtype)
    return (y, Ignored.apply(h.detach(), u)) if return_last_state else y


@torch.no_grad()
def selective_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,
) -> Tensor:  # fmt: skip
    """One token, in place: state (b, e, n), x, dt (b, e), B, C (b, n). No gradient."""
    assert D is not None and dt_bias is not None, "the launcher fails without them"
    dt = F.softplus(dt + dt_bias) if dt_softplus else dt + dt_bias
    state.mul_(torch.exp(dt[..., None] * A)).add_((dt * x)[..., None] * B[:, None])
    y = (state * C[:, None]).sum(-1) + D * x
    return (y if z is None else y * F.silu(z)).to(x.dtype)


def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """x (b, e, l), weight (e, k)."""
    (_, e, l), k = x.shape, weight.shape[1]
    assert x.stride(2) == 1 and x.stride(1) == l, "with one position, too: else the kernel takes it for channel-last"
    assert 2 <= k <= 4 and (bias is None or bias.dtype == weight.dtype)
    w = torch.promote_types(weight.dtype, torch.float32)
    y = F.conv1d(F.pad(x.to(w), (k - 1, 0)), weight.to(w)[:, None], None if bias is None else bias.to(w), groups=e)
    return (F.silu(y) if activation else y).to(x.dtype)


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """One token, in place: x (b, e), conv_state (b, e, at least k - 1). No gradient."""
    assert conv_state.dtype == x.dtype
    window = torch.cat([conv_state, x[:, :, None]], 2)
    conv_state.copy_(window[:, :, -conv_state.shape[2] :])
    w = torch.promote_types(weight.dtype, torch.float32)
    y = (window[:, :, -weight.shape[1] :].to(w) * weight.to(w)).sum(-1)
    y = y if bias is None else y + bias.to(w)
    return (F.silu(y) if activation else y).to(x.dtype)


def mamba_inner_fn(
    xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor, delta_proj_weight: Tensor,
    out_proj_weight: Tensor, out_proj_bias: Tensor | None, A: Tensor, B: Tensor | None, C: Tensor | None, D: Tensor,
    delta_bias: Tensor, delta_softplus: bool = True,
) -> Tensor:  # fmt: skip
    """xz (b, 2e, l) -> (b, l, d)."""
    assert B is None and C is None and out_proj_bias is None and D.dtype == delta_bias.dtype == A.dtype
    r, n = delta_proj_weight.shape[1], A.shape[1]
    x, z = xz.contiguous().chunk(2, 1)
    u = causal_conv1d_fn(x.contiguous(), conv1d_weight[:, 0], conv1d_bias, activation="silu")
    low, B, C = F.linear(u.transpose(1, 2), x_proj_weight).split([r, n, n], -1)
    delta = F.linear(low, delta_proj_weight).transpose(1, 2)
    y = selective_scan_fn(u, delta, A, B.transpose(1, 2), C.transpose(1, 2), D, z, delta_bias, delta_softplus)
    return F.linear(y.transpose(1, 2), out_proj_weight)


def layer_norm_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, eps: float, prenorm: bool, residual_in_fp32: bool,
    is_rms_norm: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The norm of x + residual, and the sum."""
    assert prenorm and residual.shape == x.shape
    w = torch.promote_types(residual.dtype, torch.float32)
    total = x.to(w) + residual.to(w)
    if is_rms_norm:
        y = F.rms_norm(total, total.shape[-1:], weight.to(w), eps)
    else:
        y = F.layer_norm(total, total.shape[-1:], weight.to(w), None if bias is None else bias.to(w), eps)
    return y.to(x.dtype), total.to(residual.dtype)


STAND_INS = Kernels(
    selective_scan_fn,
    selective_state_update,
    causal_conv1d_fn,
    causal_conv1d_update,
    mamba_inner_fn,
    layer_norm_fn,
    name="fused[stand-ins]",
    device="cpu",
    dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
)


def register(kernels: Kernels, patch: Any) -> Kernels:
    """Let `backend="fused"` mean these kernels, as long as the monkeypatch lasts."""
    from kernels_bridge import BACKENDS
    from kernels_bridge.backends import Backend
    from kernels_bridge.fused import make

    patch.setitem(BACKENDS, "fused", Backend("fused", "stand-ins", (), make(lambda: kernels, kernels.name)))
    return kernels

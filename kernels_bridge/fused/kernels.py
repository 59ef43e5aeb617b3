"""mamba-ssm's and causal-conv1d's kernels, seen channel-last: the only file that knows their layout (b, e, l).

A `Kernels` holds the functions that the packages export. Tests put others in their place, which run on a CPU; such a
value has a name that says so, and no backend of the table has it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from minimal_mamba.block import wide
from minimal_mamba.errors import BackendUnavailable

from ..by_hand import refuse_second

NAME = "fused"
TYPES = (torch.float32, torch.bfloat16, torch.float16)
GRID = 2**16 - 1  # channels of one launch of the scan, which are an axis of its grid
INDEX = 2**32  # numbers of one input of the convolution, whose offsets have 32 bits


@dataclass(frozen=True)
class Kernels:
    """The kernels, with the names and signatures of the packages.

    Args:
        name: what `Run.backend` says. device: the type of device that they run on. dtypes: of weights that they take.
    """

    selective_scan_fn: Callable[..., Any]
    selective_state_update: Callable[..., Tensor]
    causal_conv1d_fn: Callable[..., Tensor]
    causal_conv1d_update: Callable[..., Tensor]
    mamba_inner_fn: Callable[..., Tensor]
    layer_norm_fn: Callable[..., Any]
    name: str = NAME
    device: str = "cuda"
    dtypes: tuple[torch.dtype, ...] = TYPES

    def scan(self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        """The scan from a state of zeros.

        Args:
            u, dt: (b, l, e), dt after softplus. A: (e, n). B, C: (b, l, n). All of one type, float32 on a GPU.
        Returns:
            y (b, l, e), differentiable; the last state (b, e, n), WITHOUT a gradient: the kernel's backward ignores it.
        """
        u, dt, B, C = (aligned(x.transpose(1, 2)) for x in (u, dt, B, C))  # (b, e, l), (b, n, l)
        y, last = self.selective_scan_fn(u, dt, A, B, C, return_last_state=True)
        return _aligned_backward(y).transpose(1, 2), last.detach()

    def states(self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """The kernel's own inner states (b, l, e, n), at every position, in one call.

        A scan has one group of channels a state dimension, and of group i C is the unit vector e_i, so that its y is
        h[..., i]. Cost: one scan of n times the channels, or more of them where a launch takes fewer.
        """
        (b, l, e), n = u.shape, A.shape[1]
        if n * e > GRID and e > 1:
            parts = zip(*(x.tensor_split(2, -1) for x in (u, dt)), A.tensor_split(2), strict=True)
            return torch.cat([self.states(u, dt, A, B) for u, dt, A in parts], 2)
        unit = repeat(torch.eye(n, dtype=u.dtype, device=u.device), "g n -> b g n l", b=b, l=l).contiguous()
        y = self.selective_scan_fn(
            aligned(repeat(u, "b l e -> b (g e) l", g=n)),
            aligned(repeat(dt, "b l e -> b (g e) l", g=n)),
            repeat(A, "e n -> (g e) n", g=n),
            aligned(repeat(B, "b l n -> b g n l", g=n).contiguous()),
            unit,
        )
        return rearrange(y, "b (g e) l -> b l e g", g=n)

    def scan_step(self, h: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        """One token, without gradients: h (b, e, n), u, dt (b, e), B, C (b, n) -> h, y (b, e)."""
        h = h.clone(memory_format=torch.contiguous_format)  # the kernel writes to it, and a carried state is a value
        zero = torch.zeros_like(A[:, 0])  # without D or dt_bias the kernel's launcher fails
        u, dt, B, C = (x.contiguous() for x in (u, dt, B, C))
        return h, self.selective_state_update(h, u, dt, A, B, C, D=zero, dt_bias=zero)

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The causal convolution of x (b, l, e) after zeros, with weight (e, k): (b, l, e)."""
        _reach(*x.shape)
        # a copy even where one token makes a transposed view contiguous: its strides are not what the kernel takes
        x = x.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        return _aligned_backward(self.causal_conv1d_fn(x, weight, bias)).transpose(1, 2)

    def conv_step(self, x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """One token, without gradients: x (b, e), the window before it (b, e, k) -> conv (b, e), window."""
        after = window.to(x.dtype).clone(memory_format=torch.contiguous_format)  # the kernel writes to it
        y = self.causal_conv1d_update(x.contiguous(), after, weight, bias)
        return y, after.to(window.dtype)

    def block(self, mixer: nn.Module, x: Tensor) -> Tensor:
        """All of `Mixer.forward` from a blank memory: x (b, l, d) -> mixer_out (b, l, d)."""
        m: Any = mixer
        w = wide(m.A_log.dtype)
        xz = rearrange(m.in_proj.weight @ rearrange(x, "b l d -> d (b l)"), "e (b l) -> e b l", l=x.shape[1])
        xz = _lengthened(xz).transpose(0, 1)  # channels stay outermost: the offsets of x alone are the convolution's
        _reach(x.shape[0], xz.shape[2], len(m.A_log))
        if m.in_proj.bias is not None:
            xz = xz + m.in_proj.bias.to(xz.dtype)[:, None]
        mixed = _first_gradients(self.mamba_inner_fn(
            xz, m.conv1d.weight, m.conv1d.bias, m.x_proj.weight, m.dt_proj.weight, m.out_proj.weight,
            None,  # the bias of out_proj: its backward there sums over all axes
            m.A(w), None, None, m.D.to(w), delta_bias=m.dt_proj.bias.to(w), delta_softplus=True,
        ))[:, : x.shape[1]]  # fmt: skip
        return mixed if m.out_proj.bias is None else mixed + m.out_proj.bias.to(mixed.dtype)

    def add_norm(self, resid: Tensor, mixed: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """resid + mixed (b, l, d), in the type of resid, and its norm, in that of mixed."""
        n: Any = norm
        if mixed is None:
            return resid, n(resid)
        normal, resid = self.layer_norm_fn(
            mixed, n.weight, getattr(n, "bias", None), residual=resid, eps=n.eps, prenorm=True,
            residual_in_fp32=resid.dtype == torch.float32, is_rms_norm=not isinstance(norm, nn.LayerNorm),
        )  # fmt: skip
        return _first_gradients(resid), _first_gradients(normal)


def aligned(x: Tensor) -> Tensor:
    """x (b, ..., l), copied where the kernels could not load it.

    Where l is a multiple of 128 (the scan) or of 16 bytes (the convolution) they load 16 bytes at once, without a look
    at the strides: a row that begins elsewhere, as those of a slice may, is a "misaligned address", after which the
    process can use the GPU no more.
    """
    whole = 16 // x.element_size()
    rows = [step for size, step in zip(x.shape[:-1], x.stride(), strict=False) if size > 1]
    ready = x.stride(-1) == 1 and (x.shape[-1] % whole or not (x.data_ptr() % 16 or any(s % whole for s in rows)))
    return x if ready else x.clone(memory_format=torch.contiguous_format)


def _lengthened(x: Tensor) -> Tensor:
    """x (..., l), with zeros after its end where the backward of the convolution with silu would be wrong.

    The kernel takes a row in chunks of 128 times 16 bytes. Where the last of several holds less than 16 bytes (l = 513,
    514, 515, 1025, ... in float32), the backward takes tokens before that chunk for zeros: in causal-conv1d 1.7.0 it
    loads `x[i - kNElts]` only where `chunk * kChunkSize + i` is inside the row. Gradients of the last tokens, of the
    weight and of the bias are wrong then, by per cents. Without silu no tokens before the chunk are needed.
    """
    whole = 16 // x.element_size()
    last = x.shape[-1] % (128 * whole)
    return F.pad(x, (0, whole - last)) if x.shape[-1] > 128 * whole and 0 < last < whole else x


def _reach(b: int, l: int, e: int) -> None:
    """Raise BackendUnavailable for an input of the convolution that its offsets do not reach: they would begin anew."""
    if b * l * e >= INDEX:
        raise BackendUnavailable(
            f"backend='fused' cannot run {b} rows of {l} tokens through {e} channels at once: the convolution's kernel "
            f"has offsets of 32 bits, {INDEX:,} numbers; run fewer rows at a time, or a row in pieces with `state=`."
        )


def _aligned_backward(y: Tensor) -> Tensor:
    """y (b, e, l), whose gradient reaches the kernel's backward aligned."""
    if y.requires_grad:
        y.register_hook(aligned)
    return _first_gradients(y)


def _first_gradients(y: Tensor) -> Tensor:
    """y, of which no gradient can be differentiated again: what the kernels' backward gives, autograd takes for
    constants."""
    if y.requires_grad:
        y.register_hook(lambda _: refuse_second())
    return y


@cache
def load() -> Kernels:
    """The real kernels; ImportError where the packages are not whole."""
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn
    from mamba_ssm.ops.triton.layer_norm import layer_norm_fn
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    return Kernels(
        selective_scan_fn, selective_state_update, causal_conv1d_fn, causal_conv1d_update, mamba_inner_fn, layer_norm_fn
    )

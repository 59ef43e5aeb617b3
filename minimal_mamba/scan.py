"""The two recurrences of Mamba, one token at a time: the causal convolution and the selective scan.

`causal_conv` and `selective_scan` are the readable operations. A backend puts others in their place (`Ops`) that mean
the same: it runs the stretches that no edit touches in its own way and takes one readable step at each position that
an edit touches, the state handed from one to the next.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from torch import Tensor, nn

from .tap import NO_TAP, Tap

Memory = tuple[Tensor, Tensor]  # a layer's ssm_state (b, e, n) and conv_state (b, e, k)
Step = Callable[[Tensor, Memory], tuple[Tensor, Memory]]


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, *, mask: Tensor | None = None, tap: Tap = NO_TAP
) -> tuple[Tensor, Tensor]:
    """Convolve each channel with its own past.

        conv_t = bias + sum_i weight[:, i] x_{t-k+1+i}

    Args:
        x: (b, l, e) inputs.
        weight: (e, k), newest input last. bias: (e,) or None.
        window: (b, e, k) the last k inputs before x, newest last; its oldest is never used.
        mask: (b, l) True on tokens, False on padding, which leaves the window as it is; None: all tokens.
        tap: offers `conv_state` at every position.
    Returns:
        conv (b, l, e), and the window after the last token (b, e, k).
    Cost: l Python steps.
    Source: causal_conv1d.causal_conv1d_interface.causal_conv1d_update_ref, repeated (1.7.0).
        Differs: the window is a value.
    """
    out = []
    for t, x_t in enumerate(x.unbind(1)):
        window_t = torch.cat([window[:, :, 1:], x_t[:, :, None]], dim=2)  # (b, e, k)
        out.append(einsum(window_t, weight, "b e k, e k -> b e"))
        window_t = tap("conv_state", window_t, t)
        window = window_t if mask is None else torch.where(mask[:, t, None, None], window_t, window)
    conv = torch.stack(out, dim=1)  # (b, l, e)
    return conv if bias is None else conv + bias, window


def ssm_step(
    h: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, tap: Tap = NO_TAP, t: int = 0
) -> tuple[Tensor, Tensor]:
    """Take in one token and read the state.

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t        y_t = C_t h_t

    Args:
        h: (b, e, n) the state before this token, float32 or wider.
        u, dt: (b, e) input, and step size > 0. A: (e, n) < 0. B, C: (b, n).
        tap, t: offers `decay`, `state_write`, `ssm_state`, `state_read` at position t.
    Returns:
        h (b, e, n) after this token, and y (b, e).
    Source: Gu & Dao 2023 (arXiv:2312.00752), Eq. 2a, 2b and 4, with B discretised by Euler's rule (dt B) as the
        official code does.
    """
    decay = tap("decay", torch.exp(einsum(dt, A, "b e, e n -> b e n")), t)  # (b, e, n)  A-bar
    write = tap("state_write", einsum(dt * u, B.to(dt.dtype), "b e, b n -> b e n"), t)  # (b, e, n)  B-bar u
    h = tap("ssm_state", decay * h + write, t)  # (b, e, n)  Eq. 2a
    read = tap("state_read", h, t)
    return h, einsum(read, C.to(read.dtype), "b e n, b n -> b e")  # Eq. 2b


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, *, tap: Tap = NO_TAP
) -> tuple[Tensor, Tensor]:
    """Run `ssm_step` over a sequence.

    Args:
        u, dt: (b, l, e) input, and step size; 0 on padding, which leaves the state as it is.
        A: (e, n). B, C: (b, l, n). h: (b, e, n) the state before the first token.
    Returns:
        y (b, l, e), and the state after the last token (b, e, n).
    Cost: l Python steps; without gradients no memory beyond y and one state.
    Source: Gu & Dao 2023, Algorithm 2; mamba_ssm.ops.selective_scan_interface.selective_scan_ref @ e9594ce.
        Differs: an initial state, one step at a time, no D and no gate.
    """
    ys = []
    tokens = zip(u.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True)
    for t, (u_t, dt_t, B_t, C_t) in enumerate(tokens):
        h, y = ssm_step(h, u_t, dt_t, A, B_t, C_t, tap=tap, t=t)
        ys.append(y)
    return torch.stack(ys, dim=1), h  # (b, l, e)


@dataclass(frozen=True)
class Ops:
    """The operations of a backend.

    Only `conv` and `scan` are needed. The others are for backends whose kernels do several lines of the forward at
    once; where one is None or cannot run, the forward goes line by line.

    Args:
        conv, scan: with the signatures of `causal_conv` and `selective_scan`.
        block: all of `Mixer.forward`, (mixer, x (b, l, d), memory, mask, tap) -> mixer_out (b, l, d), the memory after
            it. It runs where no site inside the mixer is edited and only those of `records` are recorded. Where the tap
            says `last_only`, it gives each row's last token alone, (b, 1, d).
        records: the sites inside the mixer that `block` can record; it hands their values to the tap.
        step: mixer -> all of `Mixer.forward` for a single token, a function (x (b, 1, d), memory) -> mixer_out, the
            memory after it. It is preferred to `block`, and runs where no gradient is wanted and no site inside the
            mixer is edited or recorded at this token.
        add_norm: (resid, mixed, norm) -> resid + mixed, and its norm; `mixed` is None where only the norm is wanted. It
            runs where no site between the two is edited or recorded.
        begin: (model, fresh, keep) -> the operations of one forward; `fresh` says that it starts from a blank memory,
            `keep` that the memory after it is asked for. It raises for a model that the kernels cannot run.
        carry: what changes of the state do to later tokens; `kernels_bridge.carry.carry` where it is None.
    """

    name: str
    conv: Callable[..., tuple[Tensor, Tensor]]
    scan: Callable[..., tuple[Tensor, Tensor]]
    block: Callable[[Any, Tensor, Memory, Tensor | None, Tap], tuple[Tensor, Memory]] | None = None
    records: tuple[str, ...] = ()
    step: Callable[[Any], Step] | None = None
    add_norm: Callable[[Tensor, Tensor | None, nn.Module], tuple[Tensor, Tensor]] | None = None
    begin: Callable[[nn.Module, bool, bool], "Ops"] | None = None
    carry: Callable[..., Tensor] | None = None


READABLE = Ops("reference", causal_conv, selective_scan)

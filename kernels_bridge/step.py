"""The single step: one token through a mixer of which nothing inside is touched, without gradients (law 2)."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from minimal_mamba.block import Mixer, selection, wide
from minimal_mamba.scan import Memory, Step


class Weights(NamedTuple):
    """A mixer's weights as a step takes them; from the convolution to D in float32 or wider but for the matrices."""

    in_proj: Tensor  # (2 e, d)
    in_bias: Tensor | None  # (2 e)
    conv: Tensor  # (e, k)
    conv_bias: Tensor  # (e), zeros without one
    x_proj: Tensor  # (r + 2 n, e)
    dt_proj: Tensor  # (e, r)
    dt_bias: Tensor  # (e)
    A: Tensor  # (e, n)
    D: Tensor  # (e)
    out_proj: Tensor  # (d, e)
    out_bias: Tensor | None  # (d)


def weights(mixer: Mixer) -> Weights:
    """The weights of a mixer, with their graph where gradients are wanted."""
    m, w = mixer, wide(mixer.x_proj.weight.dtype)
    conv = m.conv1d.weight.squeeze(1).to(w)
    bias = conv.new_zeros(len(conv)) if m.conv1d.bias is None else m.conv1d.bias.to(w)
    A, D, dt_bias = m.A(w), m.D.to(w), m.dt_proj.bias.to(w)
    return Weights(m.in_proj.weight, m.in_proj.bias, conv, bias, m.x_proj.weight, m.dt_proj.weight, dt_bias, A, D,
                   m.out_proj.weight, m.out_proj.bias)  # fmt: skip


@torch.no_grad()
def step(mixer: Mixer) -> Step:
    """A mixer's step in as few operations as there are.

    Cost: a few times (b, e, n); where b is small, reading the weights.
    """
    return partial(advance, weights(mixer), mixer.rms_eps)


def advance(w: Weights, eps: float | None, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
    """`Mixer.forward` for one token: x (b, 1, d), the memory before it -> (b, 1, d), the memory after it."""
    (h, window), (r, n) = memory, (w.dt_proj.shape[1], w.A.shape[1])
    x, z = F.linear(x[:, 0], w.in_proj, w.in_bias).chunk(2, -1)  # (b, e) each
    window = torch.cat([window[:, :, 1:], x[:, :, None]], 2)  # (b, e, k)
    u = F.silu((window * w.conv).sum(-1).add_(w.conv_bias).to(x.dtype))  # (b, e)
    dt_low, B, C = selection(F.linear(u, w.x_proj), (r, n, n), eps)  # (b, r), (b, n), (b, n)
    dt = F.softplus(F.linear(dt_low, w.dt_proj).to(h.dtype) + w.dt_bias)  # (b, e)
    h = torch.exp(dt[:, :, None] * w.A).mul_(h).addcmul_((dt * u)[:, :, None], B[:, None].to(h.dtype))  # (b, e, n)
    y = torch.bmm(h, C[:, :, None].to(h.dtype))[:, :, 0]  # (b, e)
    gated = (torch.addcmul(y, w.D, u.to(h.dtype)) * F.silu(z.to(h.dtype))).to(z.dtype)
    return F.linear(gated, w.out_proj, w.out_bias)[:, None], (h, window)

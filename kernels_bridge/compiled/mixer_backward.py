"""`mixer.forward` with gradients: of a mixer from a blank memory, as training runs it.

The forward keeps what a few of its lines give (`mixer.Saved`); u, dt and the states are made again, as mamba-ssm's
`mamba_inner_fn` makes them. The backward takes some rows after others, in memory that it uses again; what they give
to a weight is summed in an order that depends on the number of threads.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..by_hand import by_hand
from ..step import Weights
from ..threads import free, over
from .loop import run
from .mixer import Saved, ends, first, forward, piece, pieces, product, selected, shares, space
from .scan import TOKENS

BUFFERS = 6  # (tokens, e) each
PRODUCTS = ("in_proj", "in_bias", "x_proj", "dt_proj", "out_proj", "out_bias")  # whose gradients cost some


def learn(w: Weights, eps: float | None, x: Tensor, sizes: Tensor) -> Tensor:
    """The mixer of x (b, l, d), rows of `sizes` tokens, on padding what nothing gives -> (b, l, d).

    eps: of FalconMamba's norms, or None.
    """
    out: Tensor = _Mixer.apply(eps, x, sizes, *w)
    return out


class _Mixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, eps: float | None, x: Tensor, sizes: Tensor, *given: Tensor) -> Tensor:
        w, (b, l, _), ctx.eps = Weights(*given), x.shape, eps
        (e, n), k = w.A.shape, w.conv.shape[1]
        memory, saved = (x.new_zeros(b, e, n), x.new_zeros(b, e, k)), None
        if any(ctx.needs_input_grad):
            chunks = -(-l // TOKENS)
            inputs, z, s, low = (x.new_empty(b, l, size) for size in (e, e, e, len(w.x_proj)))
            saved = Saved(inputs, z, low, s, x.new_empty(b, chunks, n, e))
            ctx.save_for_backward(x, sizes, *saved, *given)
        return forward(w, eps, x, memory, sizes, ([], x.new_empty(b, 0, e, n)), False, False, saved)[0]

    @staticmethod
    @by_hand
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, sizes, *others = ctx.saved_tensors
        many = len(Saved._fields)
        w, saved = Weights(*others[many:]), Saved(*others[:many])
        dx, dw = backward(w, ctx.eps, x, sizes, saved, dout, ctx.needs_input_grad[3:])
        return None, dx, None, *(dw.get(name) for name in Weights._fields)


def backward(
    w: Weights, eps: float | None, x: Tensor, sizes: Tensor, saved: Saved, dout: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, dict[str, Tensor]]:
    """dL/dx (b, l, d) and the gradients of the weights, from dout (b, l, d), of which padding counts for nothing.

    Args:
        wanted: of each weight, whether its gradient is; those of `PRODUCTS` that are not are left out.
    """
    from . import backward_kernels, kernels, mixer_kernels

    (b, l, _), (e, n), r, k = x.shape, w.A.shape, w.dt_proj.shape[1], w.conv.shape[1]
    if bool((sizes < l).any()):
        dout = dout.masked_fill((torch.arange(l) >= sizes[:, None])[:, :, None], 0)
    taps, A, wide = w.conv.T.contiguous(), w.A.T.contiguous(), kernels.width(n)
    across, window = -(-e // wide), x.new_zeros(b, k, e)
    dx, dA, dconv = x.new_empty(x.shape), x.new_empty(b, n, e), x.new_empty(b, k, e)
    dconv_bias, ddt_bias, dD = x.new_empty(3, b, e)
    # of the scan's backward: no position with a gradient or a write of its own, no move, no gradient of the last state
    nowhere, no_states, no = torch.empty(0, dtype=torch.long), x.new_empty(b, 0, e, n), x.new_empty(0, 0, 0, 0)
    dlast, dh, no_move = x.new_zeros(b, e, n), x.new_empty(b, e, n), (0, 0, no, no, no, no[None][:0], no)
    threads = shares(b, free())
    rows, _ = piece(-(-b // threads), l, e)
    which = [name for name, want in zip(Weights._fields, wanted, strict=True) if want and name in PRODUCTS]
    sums = [{name: torch.zeros_like(getattr(w, name)) for name in which} for _ in range(threads)]

    def share(part: tuple[slice, Sequence[Tensor], dict[str, Tensor]]) -> None:
        """Some of the rows, a few at once."""
        mine, own, total = part
        of_x, of_z = ({name: m[half] for name, m in total.items() if name in ("in_proj", "in_bias")}
                      for half in (slice(e), slice(e, None)))  # fmt: skip
        for i, _ in pieces(mine, l, rows, l):
            count = i.stop - i.start
            g, length, tokens = dout[i].contiguous(), sizes[i], count * l * e
            low = selected(saved.low[i], (r, n, n), eps)
            ds, u, raw, dt, du, ddt = (first(s, count, l, e) for s in own)

            gated, dz = u, dt  # until these are made
            product(g, w.out_proj.T, None, ds)
            run(backward_kernels.gate, count, 8 * tokens, saved.s[i], saved.z[i], ds, gated, dz)
            product(dz, w.in_proj[e:].T, None, dx[i])
            _add(total, "out_proj", g, gated)
            _add(total, "out_bias", g)
            _add(of_z, "in_proj", dz, x[i])
            _add(of_z, "in_bias", dz)

            run(mixer_kernels.conv, count, k * tokens, saved.x[i], window[i], taps, w.conv_bias, u)
            product(low[..., :r], w.dt_proj, None, raw)
            run(backward_kernels.step_sizes, count, 8 * tokens, raw, w.dt_bias, length, dt)
            B, C = low[..., r : r + n].contiguous(), low[..., r + n :].contiguous()
            dB, dC = x.new_empty(2, count, across, l, n)
            run(kernels.scan_backward, count * across, n * tokens, wide, TOKENS, u, dt, A, B, C, nowhere, no_states[i],
                nowhere, saved.starts[i], ds, dlast[i], no_states[i], du, ddt, dA[i], dB, dC, dh[i], no_states[i],
                *no_move)  # fmt: skip
            draw, dlow = raw, torch.empty_like(low)
            run(backward_kernels.step_sizes_and_skip, count, 8 * tokens, raw, w.dt_bias, ddt, u, ds, w.D, length, du,
                ddt_bias[i], dD[i])  # fmt: skip
            dlow[..., :r] = draw @ w.dt_proj
            torch.sum(dB, 1, out=dlow[..., r : r + n])
            torch.sum(dC, 1, out=dlow[..., r + n :])
            _add(total, "dt_proj", draw, low[..., :r])
            if eps is not None:
                for given, d in zip(saved.low[i].split((r, n, n), -1), dlow.split((r, n, n), -1), strict=True):
                    _through_divided(given, d, eps)
            _add(total, "x_proj", dlow, u)
            du.view(-1, e).addmm_(dlow.view(count * l, -1), w.x_proj)

            dinputs = dt
            run(backward_kernels.conv, count, k * tokens, saved.x[i], taps, w.conv_bias, du, dinputs, dconv[i],
                dconv_bias[i])  # fmt: skip
            dx[i].view(count * l, -1).addmm_(dinputs.view(-1, e), w.in_proj[:e])
            _add(of_x, "in_proj", dinputs, x[i])
            _add(of_x, "in_bias", dinputs)

    own = [mine.split(rows * l * e) for mine in space(threads, BUFFERS * rows * l * e, x.dtype)]
    over(zip(ends(b, threads), own, sums, strict=True), share, threads)
    found = {name: sum((part[name] for part in sums[1:]), sums[0][name]) for name in which}
    small = {"conv": dconv.sum(0).T, "conv_bias": dconv_bias.sum(0), "dt_bias": ddt_bias.sum(0), "A": dA.sum(0).T,
             "D": dD.sum(0)}  # fmt: skip
    return dx, found | small


def _through_divided(x: Tensor, d: Tensor, eps: float) -> None:
    """The gradient of what `divided` gives of x (b, l, m) becomes that of x, in place."""
    scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = x * scale
    d.addcmul_(y, (d * y).mean(-1, keepdim=True), value=-1).mul_(scale)


def _add(sums: dict[str, Tensor], name: str, left: Tensor, right: Tensor | None = None) -> None:
    """Add the sum over tokens of left right^T, or of left, if it is wanted; left: (b, l, p), right: (b, l, q)."""
    if name not in sums:
        return
    if right is None:
        sums[name].add_(left.sum((0, 1)))
    else:
        sums[name].addmm_(left.reshape(-1, left.shape[2]).T, right.reshape(-1, right.shape[2]))

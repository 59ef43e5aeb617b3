"""The scan and the convolution of a stretch through the compiled loops: `torch_scan.scan`, `torch_ops.taps` again."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minimal_mamba.tap import Toward

from ..by_hand import by_hand
from ..torch_scan import STATES
from .loop import run

TOKENS = 32  # of a chunk: the states kept for the backward, one a chunk, are a TOKENS-th of all


def scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h: Tensor,
    *,
    keep: Sequence[int] = (),
    added: Tensor | None = None,
    added_at: Sequence[int] = (),
    move: Toward | None = None,
    room: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch_scan.scan`, with the same arguments and results, compiled.

    Cost: an exp and three multiply-adds for each of (b, l, e, n), in vectors; memory beyond the result: (b, e, n), and
        for the backward the state at the start of each `TOKENS` tokens.
    """
    w = h.dtype
    given = u.to(w), dt, A, B.to(w), C.to(w), h, tuple(keep), added, tuple(added_at)
    if torch.is_grad_enabled():
        return _Scan.apply(*given, None if move is None else move.size, move)
    inputs, plus, kept = _as_the_loops_take_it(*given, room)
    return *_forward(inputs, h, plus, kept, False)[:2], kept[1]


class _Scan(torch.autograd.Function):
    """What the loops take and give is contiguous; A is (n, e) there."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor,
        keep: tuple[int, ...], added: Tensor | None, added_at: tuple[int, ...],
        size: Tensor | None, move: Toward | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        needs = any(ctx.needs_input_grad)
        inputs, plus, kept = _as_the_loops_take_it(u, dt, A, B, C, h, keep, added, added_at)
        y, last, starts = _forward(inputs, h, plus, kept, needs)
        ctx.save_for_backward(*inputs, *plus, kept[0], starts)
        ctx.added, ctx.move = added is not None, _Move(move, inputs) if move is not None and needs else None
        return y, last, kept[1]

    @staticmethod
    @by_hand
    def backward(ctx: Any, dy: Tensor, dlast: Tensor, dkept: Tensor) -> tuple[Tensor | None, ...]:
        from . import kernels

        *inputs, added_at, added, keep, starts = ctx.saved_tensors
        (b, l, e), n, wide = dy.shape, len(inputs[2]), kernels.width(len(inputs[2]))
        across, move = -(-e // wide), ctx.move
        du, ddt, dadded = (torch.empty_like(x) for x in (*inputs[:2], added))
        dA, dh = starts.new_empty((b, n, e)), starts.new_empty((b, e, n))
        dB, dC = starts.new_empty((2, b, across, l, n)).unbind(0)
        no = starts.new_empty((0, 0, 0, 0))
        site, axes, runs, dsize = 0, 0, (no, no, no, no[None][:0]), no
        if move is not None:
            site, axes, runs = getattr(kernels, move.site.upper()), move.axes, move.runs
            dsize = starts.new_empty((b, l, e, move.n) if axes else (b, across, l, n))
        run(kernels.scan_backward, b * across, b * l * e * n, wide, _step(l), *inputs, added_at, added, keep, starts,
            *(g.contiguous() for g in (dy, dlast, dkept)), du, ddt, dA, dB, dC, dh, dadded,
            site, axes, *runs, dsize)  # fmt: skip
        if move is not None and not axes:
            dsize = dsize.sum(1)[:, :, None].sum_to_size(b, l, 1, move.n)
        return (du, ddt, dA.sum(0).T, dB.sum(1), dC.sum(1), dh, None, dadded if ctx.added else None, None,
                None if move is None else dsize, None)  # fmt: skip


class _Move:
    """A move's runs as the loops take them, the states at the start of their chunks among it."""

    def __init__(self, move: Toward, inputs: tuple[Tensor, ...]):
        self.site, (e, self.n) = move.site, move.size.shape[2:]
        self.axes = 0 if e == 1 else 1 if self.n == 1 else 2  # what `kernels` takes for the axes of `size`
        w = inputs[0].dtype
        u, dt, B = (torch.stack(x).to(w) for x in zip(*((r.u, r.dt, r.B) for r in move.runs), strict=True))
        starts = [inputs[0].new_empty((-(-u.shape[2] // _step(u.shape[2])), 1, 1, 1)) for _ in move.runs]
        if self.site in STATES:
            nothing = torch.empty(0, dtype=torch.long), _none(move.runs[0].h)
            starts = [
                _forward((u[i], dt[i], inputs[2], B[i], inputs[4]), r.h, nothing, nothing, True)[2].transpose(0, 1)
                for i, r in enumerate(move.runs)
            ]
        self.runs = u, dt, B, torch.stack(starts, 1)  # (runs, b, l, ...), and (chunks, runs, b, n, e)


def _as_the_loops_take_it(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, keep: tuple[int, ...], added: Tensor | None,
    added_at: tuple[int, ...], room: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:  # fmt: skip
    """What the states are made from; positions and what is added there; positions and the memory for their states."""
    inputs = tuple(x.contiguous() for x in (u, dt, A.T, B, C))
    plus = torch.tensor(added_at, dtype=torch.long), _none(h) if added is None else added.contiguous()
    room = h.new_empty((len(h), len(keep), *h.shape[1:])) if room is None else room
    return inputs, plus, (torch.tensor(keep, dtype=torch.long), room)


def _forward(
    inputs: tuple[Tensor, ...], h: Tensor, plus: tuple[Tensor, Tensor], kept: tuple[Tensor, Tensor], needs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state (b, e, n), and, if a backward needs them, those at the start of chunks (b, chunks, n, e)."""
    from . import kernels

    (b, l, e), n, h = inputs[0].shape, h.shape[2], h.contiguous()
    y, last, wide = h.new_empty((b, l, e)), torch.empty_like(h), kernels.width(n)
    starts = h.new_empty((b, -(-l // _step(l)) if needs else 0, n, e))
    run(kernels.scan, b * -(-e // wide), b * l * e * n, wide, _step(l), *inputs, h, *plus, *kept, y, last, starts)
    return y, last, starts


def _step(l: int) -> int:
    return min(l, TOKENS)


def _none(h: Tensor) -> Tensor:
    """The states of no position."""
    return h[:, None][:, :0].contiguous()


def taps(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch_ops.taps`, compiled: x (b, k - 1 + l, e), weight (e, k), bias (e,) or None -> (b, l, e), of x's type."""
    zero = weight.new_zeros(len(weight)) if bias is None else bias
    result: Tensor = _Conv.apply(x, weight, zero.to(x.dtype))
    return result


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        from . import kernels

        (b, long, e), k = x.shape, weight.shape[1]
        x, weight = x.contiguous(), weight.T.contiguous()
        out = x.new_empty((b, long - k + 1, e))
        run(kernels.conv, b, out.numel() * k, x, weight, bias.contiguous(), out)
        ctx.save_for_backward(x, weight)
        return out

    @staticmethod
    @by_hand
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from . import kernels

        x, weight = ctx.saved_tensors
        dx, dweight = torch.zeros_like(x), x.new_zeros((len(x), *weight.shape))
        run(kernels.conv_backward, len(x), 2 * x.numel() * len(weight), x, weight, dout.contiguous(), dx, dweight)
        return dx, dweight.sum(0).T, dout.sum((0, 1))

"""The selective scan in plain PyTorch, fast on a CPU: blocks of tokens and channels that stay in the cache.

Within a block decays and writes are made for all its tokens at once, time first, and the recurrence runs in place, one
fused multiply-add a token. Nothing of size (b, l, e, n) is ever held; the backward runs the blocks in reverse, each
remade from the state at its start.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minimal_mamba.tap import Toward

from .by_hand import by_hand
from .threads import free, over

# A block is some rows of the batch, some tokens and, where one row is too large, some channels. It has TOKENS tokens or
# more, but at a row's end, so the states kept for the backward are at most one for each TOKENS tokens, begun or whole;
# and at most BLOCK numbers a buffer, which the cache holds. Rows are cut before channels: long contiguous runs of
# channels are what is fast.
BLOCK = 1 << 19
TOKENS = 16
FEW = 1 << 20  # numbers, which one thread has done before a second pays

STATES = ("ssm_state", "state_read")  # the sites of a move that need the states of its runs


def _threads(h: Tensor, l: int) -> int:
    """On how many threads the blocks of a scan run, each on one."""
    alone = h.device.type != "cpu" or torch.is_autocast_enabled("cpu") or h.numel() * l < FEW
    return 1 if alone else free()


def cut(b: int, l: int, e: int, n: int, threads: int = 1) -> tuple[int, int, int]:
    """Rows, tokens and channels of a block."""
    width = max(1, min(e, BLOCK // (TOKENS * n)))
    rows = max(1, min(-(-b // threads), BLOCK // (TOKENS * width * n)))
    return rows, max(1, min(l, 64, BLOCK // (rows * width * n))), width


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
    """The selective scan of a stretch that no edit touches.

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t + added_t        y_t = C_t h_t

    Args:
        u, dt: (b, l, e). A: (e, n). B, C: (b, l, n). h: (b, e, n) the state before the first token. float32 or float64.
        keep: positions whose states are returned, ascending.
        added: (b, p, e, n) added to the state at the positions `added_at`, ascending.
        move: a site's move toward another run, over these tokens; its size takes its gradient and is taken as zero.
        room: the memory for the kept states, where no gradient is wanted; None: new.
    Returns:
        y (b, l, e); the last state (b, e, n); the kept states (b, len(keep), e, n). All are differentiable, once.
    Cost: l multiply-adds of (b, e, n); memory beyond the result: some blocks, and for the backward the state at the
        start of each block of tokens. A move costs one more run over the states of its donor, forward and backward,
        and their states at the start of each block.
    Source: mirrors mamba_ssm.ops.selective_scan_interface.selective_scan_fn @ e9594ce. Differs: an initial state,
        states at chosen positions, and the gradient of every state that is returned.
    """
    w = h.dtype
    size = None if move is None else move.size
    return _Scan.apply(u.to(w), dt, A, B.to(w), C.to(w), h, tuple(keep), added, tuple(added_at), size, move, room)


class _Inputs(NamedTuple):
    """What the states of a run are made from."""

    u: Tensor  # (b, l, e)
    dt: Tensor  # (b, l, e)
    B: Tensor  # (b, l, n)
    A_t: Tensor  # (n, e)


class _Scan(torch.autograd.Function):
    """Inside, a state is (b, n, e): the long axis comes last, so that every product runs along contiguous memory."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor,
        keep: tuple[int, ...], added: Tensor | None, added_at: tuple[int, ...],
        size: Tensor | None, move: Toward | None, room: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        (b, l, e), n = u.shape, A.shape[1]
        needs = any(ctx.needs_input_grad)
        threads = 1 if move is not None else _threads(h, l)  # a move has one memory for all blocks
        rows, step, width = cut(b, l, e, n, threads)
        starts = h.new_empty((-(-l // step) if needs else 0, b, n, e))  # the state before each block of tokens
        y, last = torch.empty_like(dt), torch.empty_like(h)
        kept = h.new_empty((b, len(keep), e, n)) if room is None else room
        own = _Inputs(u, dt, B, A.T.contiguous())
        ctx.move = _Move(move, own.A_t, (b, l, e, n), (rows, step, width)) if move is not None and needs else None

        def forth(where: tuple[slice, slice]) -> None:
            r, c = where
            state = h[r, c].transpose(1, 2).clone(memory_format=torch.contiguous_format)  # (r, n, c), changed in place
            block = _Block(step, len(state), n, c.stop - c.start, h)
            for k, s in enumerate(_pieces(l, step)):
                if needs:
                    starts[k, r, :, c] = state
                states = block.states(r, s, c, own, state, added, added_at)
                y[r, s, c] = torch.matmul(_time_first(C, r, s)[:, :, None], states)[:, :, 0].transpose(0, 1)
                if mine := [*_inside(keep, s)]:  # ascending, without gaps in i
                    i, t = mine[0]
                    m, at = len(mine), [t - s.start for _, t in mine]
                    some = states[at[0] : at[0] + m] if mine[-1][1] - t == m - 1 else states[at]
                    kept[r, i : i + m, c] = some.permute(1, 0, 3, 2)
                state.copy_(states[-1])
            last[r, c] = state.transpose(1, 2)

        over(_grid(b, rows, e, width), forth, threads)
        ctx.save_for_backward(u, dt, A, B, C, added, starts)
        ctx.keep, ctx.added_at, ctx.cut, ctx.threads = keep, added_at, (rows, step, width), threads
        return y, last, kept

    @staticmethod
    @by_hand
    def backward(ctx: Any, dy: Tensor, dlast: Tensor, dkept: Tensor) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, added, starts = ctx.saved_tensors
        (b, l, e), n = u.shape, A.shape[1]
        rows, step, width = ctx.cut
        own = _Inputs(u, dt, B, A.T.contiguous())
        A_t, move, grid = own.A_t, ctx.move, _grid(b, rows, e, width)
        du, ddt = torch.empty_like(dt), torch.empty_like(dt)
        dA_t = A_t.new_zeros((-(-b // rows), *A_t.shape))  # a part for each group of rows, to be summed
        dB, dC = B.new_zeros((2, -(-e // width), *B.shape)).unbind(0)  # and for each of channels
        dh = torch.empty_like(dlast)
        dadded = None if added is None else torch.empty_like(added, memory_format=torch.contiguous_format)

        def back(where: tuple[slice, slice]) -> None:
            r, c = where
            i, j = r.start // rows, c.start // width
            # dL/dh from what follows the block (r, n, c)
            flow = dlast[r, c].transpose(1, 2).clone(memory_format=torch.contiguous_format)
            block = _Block(step, len(flow), n, c.stop - c.start, starts)
            grads, product = torch.empty_like(block.write), torch.empty_like(block.write)
            for chunk, s in reversed(list(enumerate(_pieces(l, step)))):
                before = starts[chunk, r, :, c]
                states = block.states(r, s, c, own, before, added, ctx.added_at)
                m = len(states)
                out, dt_s, u_s = (_time_first(x, r, s)[..., c] for x in (dy, dt, u))  # (m, r, c) each
                B_s, C_s = _time_first(B, r, s), _time_first(C, r, s)  # (m, r, n)
                dC[j, r, s] = torch.matmul(states, out[..., None])[..., 0].transpose(0, 1)

                grad = torch.mul(C_s[..., None], out[:, :, None], out=grads[:m])  # (m, r, n, c)  dL/dh
                for k, t in _inside(ctx.keep, s):
                    grad[t - s.start] += dkept[r, k, c].transpose(1, 2)
                each, decays = grad.unbind(0), block.decay[:m].unbind(0)
                each[-1].add_(flow)
                for t in range(m - 2, -1, -1):
                    each[t].addcmul_(decays[t + 1], each[t + 1])
                torch.mul(decays[0], each[0], out=flow)
                for k, t in _inside(ctx.added_at, s):
                    assert dadded is not None
                    dadded[r, k, c] = each[t - s.start].transpose(1, 2)

                ddtu = torch.matmul(B_s[:, :, None], grad)[:, :, 0]  # (m, r, c)
                dB[j, r, s] = torch.matmul(grad, (dt_s * u_s)[..., None])[..., 0].transpose(0, 1)
                power = product[:m]  # dL/d decay = dL/dh h_before
                torch.mul(grad[1:], states[:-1], out=power[1:])
                torch.mul(grad[0], before, out=power[0])
                if move is not None:
                    reads = C_s[..., None] * out[:, :, None] if move.site == "state_read" else grad
                    move.contract(chunk, r, s, c, own, block, power if move.site == "decay" else reads)
                power *= block.decay[:m]  # dL/d(dt A)
                du[r, s, c] = (ddtu * dt_s).transpose(0, 1)
                ddt[r, s, c] = torch.addcmul(torch.mul(power, A_t[:, c], out=grad).sum(2), ddtu, u_s).transpose(0, 1)
                dA_t[i, :, c] += power.mul_(dt_s[:, :, None]).sum((0, 1))
            dh[r, c] = flow.transpose(1, 2)

        over(grid, back, ctx.threads)
        dsize = None if move is None else move.dsize
        return du, ddt, dA_t.sum(0).T, dB.sum(0), dC.sum(0), dh, None, dadded, None, dsize, None, None


class _Move:
    """A move inside the blocks: its runs are remade as the scan's own, and what each block gives goes into `dsize`."""

    def __init__(self, move: Toward, A_t: Tensor, sizes: tuple[int, ...], cut: tuple[int, int, int]):
        (b, l, e, n), (rows, step, width) = sizes, cut
        self.site, self.step = move.site, step
        self.dsize = torch.zeros_like(move.size, memory_format=torch.contiguous_format)  # (b, l, e or 1, n or 1)
        self.runs: list[tuple[_Inputs, Tensor]] = []
        self.spare: list[_Block] = []
        for run in move.runs:
            w = run.h.dtype
            made = _Inputs(run.u.to(w), run.dt, run.B.to(w), A_t)
            starts = run.h.new_empty((-(-l // step), b, n, e) if self.site in STATES else 0)
            for r, c in _grid(b, rows, e, width) if len(starts) else ():
                state = run.h[r, c].transpose(1, 2).clone(memory_format=torch.contiguous_format)
                block = _Block(step, len(state), n, c.stop - c.start, run.h)
                for k, s in enumerate(_pieces(l, step)):
                    starts[k, r, :, c] = state
                    state.copy_(block.states(r, s, c, made, state)[-1])
            self.runs.append((made, starts))

    def contract(self, k: int, r: slice, s: slice, c: slice, present: _Inputs, block: "_Block", grad: Tensor) -> None:
        """Take in a block: grad (m, r, n, c) is dL/dsite, `block` holds the states and decays of the present run."""
        m, *sizes = grad.shape
        if not self.spare or self.spare[0].decay.shape[1:] != grad.shape[1:]:
            count = 1 if len(self.runs) == 1 and self.site in STATES else 2
            self.spare = [_Block(self.step, sizes[0], sizes[1], sizes[2], grad) for _ in range(count)]
        before = [starts[k, r, :, c] if len(starts) else None for _, starts in self.runs]
        found = [self._values(spare, r, s, c, run, h)
                 for spare, (run, _), h in zip(self.spare, self.runs, before, strict=False)]  # fmt: skip
        if len(found) == 1:
            states = block.write[:m] if self.site in STATES else None
            found.append(self._values(self.spare[1], r, s, c, present, None) if states is None else states)
        moved = found[0].sub_(found[1]).mul_(grad)
        kept = self.dsize.shape[2] > 1, self.dsize.shape[3] > 1
        part = moved.sum_to_size(m, sizes[0], sizes[1] if kept[1] else 1, sizes[2] if kept[0] else 1)
        self.dsize[r, s, c if kept[0] else slice(None)] += part.permute(1, 0, 3, 2)

    def _values(self, block: "_Block", r: slice, s: slice, c: slice, run: _Inputs, before: Tensor | None) -> Tensor:
        """The site of a run over a block."""
        if before is not None:
            return block.states(r, s, c, run, before)
        decay, write = block.inputs(r, s, c, run)
        return decay if self.site == "decay" else write


class _Block:
    """The memory of one block, used again by each."""

    def __init__(self, step: int, rows: int, n: int, width: int, like: Tensor):
        self.decay = like.new_empty((step, rows, n, width))
        self.write = torch.empty_like(self.decay)

    def inputs(self, r: slice, s: slice, c: slice, run: _Inputs) -> tuple[Tensor, Tensor]:
        """The decays and the writes (tokens, rows, n, channels) of a block."""
        u, dt, B = (_time_first(x, r, s) for x in (run.u[..., c], run.dt[..., c], run.B))
        m = len(dt)
        decay = torch.mul(dt[:, :, None], run.A_t[:, c], out=self.decay[:m]).exp_()
        return decay, torch.mul((dt * u)[:, :, None], B[..., None], out=self.write[:m])

    def states(
        self, r: slice, s: slice, c: slice, run: _Inputs, state: Tensor,
        added: Tensor | None = None, added_at: Sequence[int] = (),
    ) -> Tensor:  # fmt: skip
        """The states (tokens, rows, n, channels) of a block, in place of its writes; the decays stay in `decay`."""
        decay, states = self.inputs(r, s, c, run)
        for i, t in _inside(added_at, s):
            assert added is not None
            states[t - s.start] += added[r, i, c].transpose(1, 2)
        before = state
        for now, kept in zip(states.unbind(0), decay.unbind(0), strict=True):
            now.addcmul_(kept, before)
            before = now
        return states


def _pieces(size: int, width: int) -> list[slice]:
    return [slice(first, min(first + width, size)) for first in range(0, size, width)]


def _grid(b: int, rows: int, e: int, width: int) -> list[tuple[slice, slice]]:
    return [(r, c) for r in _pieces(b, rows) for c in _pieces(e, width)]


def _time_first(x: Tensor, r: slice, s: slice) -> Tensor:
    return x[r, s].transpose(0, 1)


def _inside(positions: Sequence[int], s: slice) -> Iterator[tuple[int, int]]:
    """(index, position) of the positions inside a block."""
    return ((i, t) for i, t in enumerate(positions) if s.start <= t < s.stop)

"""The selective scan in plain PyTorch, fast on a CPU: blocks of tokens and channels that stay in the cache.

Within a block decays and writes are made for all its tokens at once, time first, and the recurrence runs in place, one
fused multiply-add a token. Nothing of size (b, l, e, n) is ever held; the backward runs the blocks in reverse, each
remade from the state at its start.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# A block is some rows of the batch, some tokens and, where one row is too large, some channels. It has at least TOKENS
# tokens, so the states kept for the backward, one a block, are at most a TOKENS-th of all; and at most BLOCK numbers a
# buffer, which the cache holds. Rows are cut before channels: long contiguous runs of channels are what is fast.
BLOCK = 1 << 19
TOKENS = 16


def cut(b: int, l: int, e: int, n: int) -> tuple[int, int, int]:
    """Rows, tokens and channels of a block."""
    width = max(1, min(e, BLOCK // (TOKENS * n)))
    rows = max(1, min(b, BLOCK // (TOKENS * width * n)))
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The selective scan of a stretch that no edit touches.

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t + added_t        y_t = C_t h_t

    Args:
        u, dt: (b, l, e). A: (e, n). B, C: (b, l, n). h: (b, e, n) the state before the first token. float32 or float64.
        keep: positions whose states are returned, ascending.
        added: (b, p, e, n) added to the state at the positions `added_at`, ascending.
    Returns:
        y (b, l, e); the last state (b, e, n); the kept states (b, len(keep), e, n). All are differentiable, once.
    Cost: l multiply-adds of (b, e, n); memory beyond the result: some blocks, and for the backward the state at the
        start of each block of tokens.
    Source: mirrors mamba_ssm.ops.selective_scan_interface.selective_scan_fn @ e9594ce. Differs: an initial state,
        states at chosen positions, and the gradient of every state that is returned.
    """
    w = h.dtype
    return _Scan.apply(u.to(w), dt, A, B.to(w), C.to(w), h, tuple(keep), added, tuple(added_at))


class _Scan(torch.autograd.Function):
    """Inside, a state is (b, n, e): the long axis comes last, so that every product runs along contiguous memory."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor,
        keep: tuple[int, ...], added: Tensor | None, added_at: tuple[int, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        (b, l, e), n = u.shape, A.shape[1]
        needs = any(ctx.needs_input_grad)
        rows, step, width = cut(b, l, e, n)
        starts = h.new_empty((-(-l // step) if needs else 0, b, n, e))  # the state before each block of tokens
        y, last, kept = torch.empty_like(dt), torch.empty_like(h), h.new_empty((b, len(keep), e, n))
        dtu, A_t = dt * u, A.T.contiguous()  # (b, l, e), (n, e)
        for r, c in _grid(b, rows, e, width):
            state = h[r, c].transpose(1, 2).clone(memory_format=torch.contiguous_format)  # (r, n, c), changed in place
            block = _Block(step, len(state), n, c.stop - c.start, h)
            for k, s in enumerate(_pieces(l, step)):
                if needs:
                    starts[k, r, :, c] = state
                states = block.states(r, s, c, dt, dtu, A_t, B, state, added, added_at)
                y[r, s, c] = torch.matmul(_time_first(C, r, s)[:, :, None], states)[:, :, 0].transpose(0, 1)
                for i, t in _inside(keep, s):
                    kept[r, i, c] = states[t - s.start].transpose(1, 2)
                state.copy_(states[-1])
            last[r, c] = state.transpose(1, 2)
        ctx.save_for_backward(u, dt, A, B, C, added, starts)
        ctx.keep, ctx.added_at, ctx.cut = keep, added_at, (rows, step, width)
        return y, last, kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor, dkept: Tensor) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, added, starts = ctx.saved_tensors
        (b, l, e), n = u.shape, A.shape[1]
        rows, step, width = ctx.cut
        dtu, A_t = dt * u, A.T.contiguous()
        du, ddt = torch.empty_like(dt), torch.empty_like(dt)
        dA_t, dB, dC = torch.zeros_like(A_t), torch.zeros_like(B), torch.zeros_like(C)
        dh = torch.empty_like(dlast)
        dadded = None if added is None else torch.empty_like(added, memory_format=torch.contiguous_format)
        for r, c in _grid(b, rows, e, width):
            # dL/dh from what follows the block (r, n, c)
            flow = dlast[r, c].transpose(1, 2).clone(memory_format=torch.contiguous_format)
            block = _Block(step, len(flow), n, c.stop - c.start, starts)
            grads, product = torch.empty_like(block.write), torch.empty_like(block.write)
            for k, s in reversed(list(enumerate(_pieces(l, step)))):
                before = starts[k, r, :, c]
                states = block.states(r, s, c, dt, dtu, A_t, B, before, added, ctx.added_at)
                m = len(states)
                out, dt_s, u_s, dtu_s = (_time_first(x, r, s)[..., c] for x in (dy, dt, u, dtu))  # (m, r, c) each
                B_s, C_s = _time_first(B, r, s), _time_first(C, r, s)  # (m, r, n)
                dC[r, s] += torch.matmul(states, out[..., None])[..., 0].transpose(0, 1)

                grad = torch.mul(C_s[..., None], out[:, :, None], out=grads[:m])  # (m, r, n, c)  dL/dh
                for i, t in _inside(ctx.keep, s):
                    grad[t - s.start] += dkept[r, i, c].transpose(1, 2)
                each, decays = grad.unbind(0), block.decay[:m].unbind(0)
                each[-1].add_(flow)
                for t in range(m - 2, -1, -1):
                    each[t].addcmul_(decays[t + 1], each[t + 1])
                torch.mul(decays[0], each[0], out=flow)
                for i, t in _inside(ctx.added_at, s):
                    assert dadded is not None
                    dadded[r, i, c] = each[t - s.start].transpose(1, 2)

                ddtu = torch.matmul(B_s[:, :, None], grad)[:, :, 0]  # (m, r, c)
                dB[r, s] += torch.matmul(grad, dtu_s[..., None])[..., 0].transpose(0, 1)
                power = torch.mul(grad, block.decay[:m], out=product[:m])  # becomes dL/d(dt A) = dL/dh decay h_before
                power[1:] *= states[:-1]
                power[0] *= before
                du[r, s, c] = (ddtu * dt_s).transpose(0, 1)
                ddt[r, s, c] = torch.addcmul(torch.mul(power, A_t[:, c], out=grad).sum(2), ddtu, u_s).transpose(0, 1)
                dA_t[:, c] += power.mul_(dt_s[:, :, None]).sum((0, 1))
            dh[r, c] = flow.transpose(1, 2)
        return du, ddt, dA_t.T, dB, dC, dh, None, dadded, None


class _Block:
    """The memory of one block, used again by each."""

    def __init__(self, step: int, rows: int, n: int, width: int, like: Tensor):
        self.decay = like.new_empty((step, rows, n, width))
        self.write = torch.empty_like(self.decay)

    def states(
        self, r: slice, s: slice, c: slice, dt: Tensor, dtu: Tensor, A_t: Tensor, B: Tensor, state: Tensor,
        added: Tensor | None, added_at: Sequence[int],
    ) -> Tensor:  # fmt: skip
        """The states (tokens, rows, n, channels) of a block, in place of its writes; the decays stay in `decay`."""
        m = s.stop - s.start
        decay = torch.mul(_time_first(dt, r, s)[:, :, None, c], A_t[:, c], out=self.decay[:m]).exp_()
        states = torch.mul(_time_first(dtu, r, s)[:, :, None, c], _time_first(B, r, s)[..., None], out=self.write[:m])
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

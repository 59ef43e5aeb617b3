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

# Numbers in one buffer of a block: as many as fit the cache, over few tokens and many channels, since each token
# costs one call. Measured with b 8 and 16, e 256 and 1536: narrower blocks and longer ones are slower.
BLOCK = 1 << 17
TOKENS = 4


def channels_of(b: int, e: int, n: int) -> int:
    """How many channels a block has."""
    return max(1, min(e, BLOCK // (TOKENS * b * n)))


def tokens_of(b: int, e: int, n: int, l: int) -> int:
    """How many tokens a block has."""
    return max(1, min(l, 64, BLOCK // (b * channels_of(b, e, n) * n)))


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
    Cost: l multiply-adds of (b, e, n); memory beyond the result: some blocks, and for the backward the state at the start
        of each block of tokens.
    Source: mirrors mamba_ssm.ops.selective_scan_interface.selective_scan_fn @ e9594ce. Differs: an initial state, states at
        chosen positions, and the gradient of every state that is returned.
    """
    w = h.dtype
    return _Scan.apply(u.to(w), dt, A, B.to(w), C.to(w), h, tuple(keep), added, tuple(added_at))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor,
                keep: tuple[int, ...], added: Tensor | None, added_at: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        (b, l, e), n = u.shape, A.shape[1]
        needs = any(ctx.needs_input_grad)
        step, width = tokens_of(b, e, n, l), channels_of(b, e, n)
        starts = h.new_empty((-(-l // step) if needs else 1, b, e, n))  # the state before each block of tokens
        y, last, kept = torch.empty_like(dt), torch.empty_like(h), h.new_empty((b, len(keep), e, n))
        dtu = dt * u
        for lo in range(0, e, width):
            c = slice(lo, lo + width)
            state = h[:, c]
            buffers = _Buffers(step, b, min(width, e - lo), n, h)
            for k, first in enumerate(range(0, l, step)):
                s = slice(first, min(first + step, l))
                if needs:
                    starts[k, :, c] = state
                states = buffers.states(s, c, dt, dtu, A, B, state, added, added_at)
                torch.matmul(states, _time_first(C, s)[..., None], out=buffers.read[: len(states)])
                y[:, s, c] = buffers.read[: len(states), :, :, 0].transpose(0, 1)
                for i, t in _inside(keep, s):
                    kept[:, i, c] = states[t - first]
                state = states[-1].clone() if s.stop < l else states[-1]
            last[:, c] = state
        ctx.save_for_backward(u, dt, A, B, C, added, starts)
        ctx.keep, ctx.added_at, ctx.step, ctx.width = keep, added_at, step, width
        return y, last, kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor, dkept: Tensor) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, added, starts = ctx.saved_tensors
        (b, l, e), n = u.shape, A.shape[1]
        step, width = ctx.step, ctx.width
        dtu = dt * u
        du, ddt = torch.empty_like(dt), torch.empty_like(dt)
        dA, dB, dC = torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(C)
        dh = torch.empty_like(starts[0])
        dadded = None if added is None else starts.new_empty(added.shape)
        for lo in range(0, e, width):
            c = slice(lo, lo + width)
            buffers = _Buffers(step, b, min(width, e - lo), n, starts)
            flow = dlast[:, c].clone()  # dL/dh_t from later tokens and the last state, at the block's end
            grads, product = torch.empty_like(buffers.write), torch.empty_like(buffers.write)
            for k in reversed(range(-(-l // step))):
                s = slice(k * step, min((k + 1) * step, l))
                m = s.stop - s.start
                states = buffers.states(s, c, dt, dtu, A, B, starts[k, :, c], added, ctx.added_at)
                decay = buffers.decay[:m]
                out, B_s, C_s = _time_first(dy, s)[..., c], _time_first(B, s), _time_first(C, s)
                dC[:, s] += torch.matmul(out[:, :, None], states)[:, :, 0].transpose(0, 1)

                grad = torch.mul(out[..., None], C_s[:, :, None], out=grads[:m])
                for i, t in _inside(ctx.keep, s):
                    grad[t - s.start] += dkept[:, i, c]
                each, decays = grad.unbind(0), decay.unbind(0)
                each[m - 1].add_(flow)
                for t in range(m - 2, -1, -1):
                    each[t].addcmul_(decays[t + 1], each[t + 1])
                torch.mul(decays[0], each[0], out=flow)
                for i, t in _inside(ctx.added_at, s):
                    dadded[:, i, c] = grad[t - s.start]

                dtB = torch.matmul(grad, B_s[..., None])[..., 0]  # (m, b, c)  dL/d(dt u)
                dt_s, u_s = _time_first(dt, s)[..., c], _time_first(u, s)[..., c]
                du[:, s, c] = (dtB * dt_s).transpose(0, 1)
                dB[:, s] += torch.matmul(_time_first(dtu, s)[:, :, None, c], grad)[:, :, 0].transpose(0, 1)
                # dL/d(dt A) = dL/dh * decay * h before
                power = torch.mul(grad, decay, out=product[:m])
                power[1:] *= states[:-1]
                power[0] *= starts[k, :, c]
                ddt[:, s, c] = (dtB * u_s + (power * A[c]).sum(-1)).transpose(0, 1)
                dA[c] += (power * dt_s[..., None]).sum((0, 1))
            dh[:, c] = flow
        return du, ddt, dA, dB, dC, dh, None, dadded, None


class _Buffers:
    """The memory of one block, used again by each."""

    def __init__(self, step: int, b: int, width: int, n: int, like: Tensor):
        self.decay = like.new_empty((step, b, width, n))
        self.write = torch.empty_like(self.decay)
        self.read = like.new_empty((step, b, width, 1))

    def states(
        self, s: slice, c: slice, dt: Tensor, dtu: Tensor, A: Tensor, B: Tensor, state: Tensor,
        added: Tensor | None, added_at: Sequence[int],
    ) -> Tensor:  # fmt: skip
        """The states (tokens, b, channels, n) of a block, made in place of its writes; the decays stay in `decay`."""
        m = s.stop - s.start
        decay = torch.mul(_time_first(dt, s)[..., c, None], A[c], out=self.decay[:m]).exp_()
        states = torch.mul(_time_first(dtu, s)[..., c, None], _time_first(B, s)[:, :, None], out=self.write[:m])
        for i, t in _inside(added_at, s):
            assert added is not None
            states[t - s.start] += added[:, i, c]
        before = state
        for now, kept in zip(states.unbind(0), decay.unbind(0), strict=True):
            now.addcmul_(kept, before)
            before = now
        return states


def _time_first(x: Tensor, s: slice) -> Tensor:
    return x[:, s].transpose(0, 1)


def _inside(positions: Sequence[int], s: slice) -> Iterator[tuple[int, int]]:
    """(index, position) of the positions inside a block."""
    return ((i, t) for i, t in enumerate(positions) if s.start <= t < s.stop)

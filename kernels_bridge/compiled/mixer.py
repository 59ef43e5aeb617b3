"""A mixer of which nothing inside is touched but states are recorded: `Mixer.forward` in pieces that stay in the cache,
its matrix products by torch and what lies between them in compiled loops. Its gradients are in `mixer_backward`."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from threading import local
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from minimal_mamba.block import Memory, Mixer, selection
from minimal_mamba.scan import Ops
from minimal_mamba.tap import Tap

from ..step import Weights, weights
from ..threads import free, over
from ..torch_ops import READ, hand_over, room
from .loop import run
from .scan import TOKENS

# numbers that a piece makes of x, then of u, dt and z: a megabyte each (measured: half or twice is worse)
CACHE = 1 << 18
FEWEST = 256  # tokens of a piece, below which the products are slower
_HELD = local()  # of a thread, the memory of its pieces


class Saved(NamedTuple):
    """What the backward of `forward` is made from; of padding too."""

    x: Tensor  # (b, l, e) into the convolution
    z: Tensor  # (b, l, e)
    low: Tensor  # (b, l, r + 2 n) what x_proj gives
    s: Tensor  # (b, l, e) the scan + D u
    starts: Tensor  # (b, chunks, n, e) the state before each `TOKENS` tokens


def block(
    mixer: Mixer, x: Tensor, memory: Memory, mask: Tensor | None, tap: Tap, *, keep: bool = True
) -> tuple[Tensor, Memory]:
    """`Mixer.forward`; without `keep` NaN comes in the place of the memory after it.

    Where gradients are wanted, it records nothing, and the memory is blank before and not kept (`begin`).

    Args:
        x: (b, l, d). mask: (b, l) True on tokens; padding comes last. All of one type, float32 or float64.
        tap: is given the states that it records; with `last_only`, of each row only the last token goes on behind the
            scan.
    Returns:
        (b, l, d), of padding what nothing gives, or (b, 1, d); and the memory.
    Cost: that of the products, and an exp and three multiply-adds for each of (b, l, e, n). Memory beyond the result:
        (3 e) of a piece's tokens for each thread, which is kept for the next call, and the memory; for gradients
        `Saved`.
    """
    w, eps, (b, l, _), (e, n), one = weights(mixer), mixer.rms_eps, x.shape, mixer.A_log.shape, tap.last_only
    sizes = torch.full((b,), l) if mask is None else mask.sum(1)
    blank = x.new_full((), torch.nan)
    after = blank.expand(b, e, n), blank.expand(memory[1].shape)
    if torch.is_grad_enabled():
        from .mixer_backward import learn

        made = learn(w, eps, x, sizes)
        return (made[torch.arange(b), sizes - 1][:, None] if one else made), after
    recorded = {site: tap.recorded(site) for site in READ}
    kept_at = tap.recorded(*READ)
    kept = room(tap, kept_at, memory[0])
    kept = x.new_empty(b, len(kept_at), e, n) if kept is None else kept
    made, given = forward(w, eps, x, memory, sizes, (kept_at, kept), one, keep)
    hand_over(tap, kept, kept_at, recorded)
    return made, given if keep else after


def forward(
    w: Weights, eps: float | None, x: Tensor, memory: Memory, sizes: Tensor, record: tuple[list[int], Tensor],
    one: bool, keep: bool, saved: Saved | None = None,
) -> tuple[Tensor, Memory]:  # fmt: skip
    """`block` of weights, of rows of so many tokens (b,).

    Args:
        eps: of FalconMamba's norms, or None.
        record: positions, and where their states go (b, positions, e, n).
        one: of each row's last token alone. keep: the memory after it is asked for; else it is of no use.
        saved: filled for a backward, without `one`.
    """
    from . import kernels, mixer_kernels

    (b, l, d), (e, n), r = x.shape, w.A.shape, w.dt_proj.shape[1]
    taps, A = w.conv.T.contiguous(), w.A.T.contiguous()  # (k, e), (n, e)
    makes = e, e, r + 2 * n, e  # numbers of a token: x, u, what x_proj gives, dt
    halves = slice(e), slice(e, None)
    in_x, in_z = ((w.in_proj[half], None if w.in_bias is None else w.in_bias[half]) for half in halves)
    window = memory[1].transpose(1, 2).clone(memory_format=torch.contiguous_format)  # (b, k, e)
    keeping, kept = torch.tensor(record[0], dtype=torch.long), record[1]
    made, gated = x.new_empty(b, 1 if one else l, d), x.new_empty(b if one else 0, 1, e)
    none, no_chunks = x.new_empty(0, 0, 0), x.new_empty(b, 0, n, e)
    threads, wide = shares(b, free()), kernels.width(n)
    rows, step = piece(-(-b // threads), l, e, free() // threads)
    step = step if saved is None else -(-step // TOKENS) * TOKENS
    h, after = memory[0], x.new_empty((b if keep or step < l else 0, e, n))

    def share(part: tuple[slice, Sequence[Tensor]]) -> None:
        """Some of the rows, piece by piece, in memory that each piece uses again."""
        mine, own = part
        for i, t in pieces(mine, l, rows, step):
            count, tokens = i.stop - i.start, t.stop - t.start
            inputs = first(own[0], count, tokens, e) if saved is None else saved.x[i, t]
            product(x[i, t], *in_x, inputs)  # at once: until it runs another thread's Python waits
            u, low, raw = (first(s, count, tokens, size) for s, size in zip(own[1:], makes[1:], strict=True))
            gate, s, starts = inputs, none, no_chunks[i]  # in the place of what is not needed any more
            if saved is not None:
                gate, low, s = saved.z[i, t], saved.low[i, t], saved.s[i, t]
                starts = saved.starts[i, t.start // TOKENS : -(-t.stop // TOKENS)]
            here = (sizes[i] - t.start).clamp(0, tokens)
            run(mixer_kernels.conv, count, u.numel() * len(taps), inputs, window[i], taps, w.conv_bias, u)
            if len(after):
                window[i] = _newest(window[i], inputs, here)
            product(u, w.x_proj, None, low)
            low = selected(low, (r, n, n), eps)
            product(low[..., :r], w.dt_proj, None, raw)
            given, out = x[i, t], raw
            if one:
                given = x[i][torch.arange(count), sizes[i] - 1]
                gate, out = first(own[0], count, 1, e), gated[i]
            product(given, *in_z, gate)
            run(mixer_kernels.recurrence, count * -(-e // wide), u.numel() * n, wide, u, raw, w.dt_bias, A, low, r, w.D,
                gate, out, one, here, (after if t.start else h)[i], after[i], keeping - t.start, kept[i],
                s, TOKENS, starts)  # fmt: skip
            if not one:
                product(out, w.out_proj, w.out_bias, made[i, t])

    parts = [rows * step * size for size in makes]
    own = [mine.split(parts) for mine in space(threads, sum(parts), x.dtype)]
    over(zip(ends(b, threads), own, strict=True), share, threads)
    if one:
        product(gated, w.out_proj, w.out_bias, made)
    return made, (after, window.transpose(1, 2))


def ends(b: int, threads: int) -> list[slice]:
    """The rows of each thread."""
    return [slice(b * i // threads, b * (i + 1) // threads) for i in range(threads)]


def shares(b: int, threads: int) -> int:
    """On how many threads rows go their way alone; 1: each loop and product is cut by itself."""
    return threads if b % threads == 0 or b >= 4 * threads else 1


def piece(b: int, l: int, width: int, threads: int = 1) -> tuple[int, int]:
    """Rows and tokens of a piece, where a token makes `width` numbers and `threads` share it."""
    tokens = max(FEWEST, CACHE // width) * threads
    return (max(1, min(b, tokens // l)), l) if l <= tokens else (1, tokens)


def pieces(rows: slice, l: int, count: int, step: int) -> Iterator[tuple[slice, slice]]:
    """The rows and the positions of each piece, in the order in which a row's memory goes on."""
    for i in range(rows.start, rows.stop, count):
        for t in range(0, l, step):
            yield slice(i, min(i + count, rows.stop)), slice(t, min(t + step, l))


def space(threads: int, size: int, dtype: torch.dtype) -> Tensor:
    """Memory (threads, size) that the next call from this thread gets again: to touch new memory costs as much as a
    product does (measured, 2 to 5 ms of a forward that takes 38)."""
    held = getattr(_HELD, str(dtype), None)
    if held is None or len(held) < threads * size:
        held = np.empty(threads * size, str(dtype).removeprefix("torch."))  # an array, which has no inference mode
        setattr(_HELD, str(dtype), held)
    return torch.from_numpy(held[: threads * size]).view(threads, size)


def first(space: Tensor, *shape: int) -> Tensor:
    """The first numbers of a piece of memory, in a shape."""
    return space[: math.prod(shape)].view(shape)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, into: Tensor) -> None:
    """into = x weight^T + bias; into is contiguous."""
    flat = into.view(-1, into.shape[-1])
    if bias is None:
        torch.mm(x.reshape(len(flat), -1), weight.T, out=flat)
    else:
        torch.addmm(bias, x.reshape(len(flat), -1), weight.T, out=flat)


def selected(low: Tensor, sizes: tuple[int, int, int], eps: float | None) -> Tensor:
    """dt_low, B and C of what x_proj gives (b, l, r + 2 n), side by side as they are there."""
    return low if eps is None else torch.cat(selection(low, sizes, eps), -1)


def _newest(window: Tensor, x: Tensor, sizes: Tensor) -> Tensor:
    """The last k inputs of each row, after `sizes` (b,) more of x (b, l, e); window: (b, k, e)."""
    k, rows = window.shape[1], torch.arange(len(window))[:, None]
    times = sizes[:, None] + torch.arange(-k, 0)  # (b, k)
    old, new = window[rows, (times + k).clamp(max=k - 1)], x[rows, times.clamp(min=0)]
    return torch.where((times >= 0)[:, :, None], new, old)


def begin(model: nn.Module, fresh: bool, keep: bool, *, ops: Ops) -> Ops:
    """The operations of one forward: with the block, where the loops have the type.

    Where gradients are wanted, only of a model in training mode, from a blank memory of which none is kept: with it
    come the gradients of all weights, and line by line only those that somebody asks for. Under autocast the products
    are of 16 bits whether something is touched or not, so line by line there.
    """
    typed: Any = model
    grad = torch.is_grad_enabled()
    suits = typed.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    suits = suits and (not grad or (model.training and fresh and not keep))
    return replace(ops, begin=None, block=partial(block, keep=keep) if suits else None, records=() if grad else READ)

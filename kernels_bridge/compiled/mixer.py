"""A mixer of which nothing inside is touched but states are recorded, and no gradient is wanted: `Mixer.forward` in
pieces that stay in the cache, its matrix products by torch and what lies between them in compiled loops."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from threading import local
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minimal_mamba.block import Memory, Mixer
from minimal_mamba.scan import Ops
from minimal_mamba.tap import Tap

from ..step import weights
from ..threads import free, over
from ..torch_ops import READ, hand_over, room
from .loop import run

# numbers that a piece makes of x, then of u, dt and z: a megabyte each (measured: half or twice is worse)
CACHE = 1 << 18
FEWEST = 256  # tokens of a piece, below which the products are slower
_HELD = local()  # of a thread, the memory of its pieces


def block(
    mixer: Mixer, x: Tensor, memory: Memory, mask: Tensor | None, tap: Tap, *, keep: bool = True
) -> tuple[Tensor, Memory]:
    """`Mixer.forward`; without `keep` NaN comes in the place of the memory after it.

    Args:
        x: (b, l, d). mask: (b, l) True on tokens; padding comes last. All of one type, float32 or float64.
        tap: is given the states that it records; with `last_only`, of each row only the last token goes on behind the
            scan.
    Returns:
        (b, l, d), of padding what nothing gives, or (b, 1, d); and the memory.
    Cost: that of the products, and an exp and three multiply-adds for each of (b, l, e, n). Memory beyond the result:
        (3 e) of a piece's tokens for each thread, which is kept for the next call, and the memory.
    """
    from . import kernels, mixer_kernels

    w, (b, l, d), (e, n), one = weights(mixer), x.shape, mixer.A_log.shape, tap.last_only
    r, taps, A = w.dt_proj.shape[1], w.conv.T.contiguous(), w.A.T.contiguous()  # (k, e), (n, e)
    makes = e, e, r + 2 * n, e  # numbers of a token: x, u, what x_proj gives, dt
    halves = slice(e), slice(e, None)
    in_x, in_z = ((w.in_proj[half], None if w.in_bias is None else w.in_bias[half]) for half in halves)
    window = memory[1].transpose(1, 2).clone(memory_format=torch.contiguous_format)  # (b, k, e)
    sizes = torch.full((b,), l) if mask is None else mask.sum(1)
    recorded = {site: tap.recorded(site) for site in READ}
    kept_at = tap.recorded(*READ)
    kept = room(tap, kept_at, memory[0])
    kept = x.new_empty(b, len(kept_at), e, n) if kept is None else kept
    keeping = torch.tensor(kept_at, dtype=torch.long)
    made, gated = x.new_empty(b, 1 if one else l, d), x.new_empty(b if one else 0, 1, e)
    threads, wide = shares(b, free()), kernels.width(n)
    rows, step = piece(-(-b // threads), l, e, free() // threads)
    h, after = memory[0], x.new_empty((b if keep or step < l else 0, e, n))

    def share(part: tuple[slice, Sequence[Tensor]]) -> None:
        """Some of the rows, piece by piece, in memory that each piece uses again."""
        mine, own = part
        for i, t in pieces(mine, l, rows, step):
            count, tokens = i.stop - i.start, t.stop - t.start
            inputs = _first(own[0], count, tokens, e)
            _product(x[i, t], *in_x, inputs)  # at once: until it runs another thread's Python waits
            u, low, raw = (_first(s, count, tokens, size) for s, size in zip(own[1:], makes[1:], strict=True))
            here = (sizes[i] - t.start).clamp(0, tokens)
            run(mixer_kernels.conv, count, u.numel() * len(taps), inputs, window[i], taps, w.conv_bias, u)
            if len(after):
                window[i] = _newest(window[i], inputs, here)
            _product(u, w.x_proj, None, low)
            _product(low[..., :r], w.dt_proj, None, raw)
            given, gate, out = x[i, t], inputs, raw  # in the place of what is not needed any more
            if one:
                given = x[i][torch.arange(count), sizes[i] - 1]
                gate, out = _first(own[0], count, 1, e), gated[i]
            _product(given, *in_z, gate)
            run(mixer_kernels.recurrence, count * -(-e // wide), u.numel() * n, wide, u, raw, w.dt_bias, A, low, r, w.D,
                gate, out, one, here, (after if t.start else h)[i], after[i], keeping - t.start, kept[i])  # fmt: skip
            if not one:
                _product(out, w.out_proj, w.out_bias, made[i, t])

    parts = [rows * step * size for size in makes]
    own = [mine.split(parts) for mine in space(threads, sum(parts), x.dtype)]
    ends = [slice(b * i // threads, b * (i + 1) // threads) for i in range(threads)]
    over(zip(ends, own, strict=True), share, threads)
    if one:
        _product(gated, w.out_proj, w.out_bias, made)
    hand_over(tap, kept, kept_at, recorded)
    if not keep:
        return made, (h.new_full((), torch.nan).expand_as(h), window.new_full((), torch.nan).expand_as(memory[1]))
    return made, (after, window.transpose(1, 2))


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


def _first(space: Tensor, *shape: int) -> Tensor:
    """The first numbers of a piece of memory, in a shape."""
    return space[: math.prod(shape)].view(shape)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, into: Tensor) -> None:
    """into = x weight^T + bias; into is contiguous."""
    flat = into.view(-1, into.shape[-1])
    if bias is None:
        torch.mm(x.reshape(len(flat), -1), weight.T, out=flat)
    else:
        torch.addmm(bias, x.reshape(len(flat), -1), weight.T, out=flat)


def _newest(window: Tensor, x: Tensor, sizes: Tensor) -> Tensor:
    """The last k inputs of each row, after `sizes` (b,) more of x (b, l, e); window: (b, k, e)."""
    k, rows = window.shape[1], torch.arange(len(window))[:, None]
    times = sizes[:, None] + torch.arange(-k, 0)  # (b, k)
    old, new = window[rows, (times + k).clamp(max=k - 1)], x[rows, times.clamp(min=0)]
    return torch.where((times >= 0)[:, :, None], new, old)


def begin(model: nn.Module, fresh: bool, keep: bool, *, ops: Ops) -> Ops:
    """The operations of one forward: with the block, where no gradient is wanted and the loops have the type.

    Under autocast the products are of 16 bits whether something is touched or not, so line by line there.
    """
    typed: Any = model
    suits = not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
    suits = suits and typed.dtype in (torch.float32, torch.float64)
    return replace(ops, begin=None, block=partial(block, keep=keep) if suits else None, records=READ)

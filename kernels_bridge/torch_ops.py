"""The `torch` backend: fast stretches where nothing is touched, the readable step where an edit is (law 4)."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from einops import einsum
from torch import Tensor
from torch.nn import functional as F

from minimal_mamba.block import wide
from minimal_mamba.scan import Ops, causal_conv, ssm_step
from minimal_mamba.tap import NO_TAP, ScanInputs, Tap, Toward

from .step import step
from .torch_scan import scan

READ = ("ssm_state", "state_read")  # the same where no edit acts


def stretches(length: int, touched: list[int]) -> Iterator[tuple[int, int, bool]]:
    """Cut 0..length into (first, stop, touched) at the touched positions."""
    first = 0
    for t in [*touched, length]:
        if first < t:
            yield first, t, False
        if t < length:
            yield t, t + 1, True
        first = t + 1


def cut(x: Tensor, cuts: list[tuple[int, int, bool]]) -> tuple[Tensor, ...]:
    """x (b, l, ...) in its stretches; the backward of all of them is one cat, of a slice each it is O(l) a slice."""
    return x.split([stop - first for first, stop, _ in cuts], 1)


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, *,
    tap: Tap = NO_TAP, scan: Callable[..., tuple[Tensor, Tensor, Tensor]] = scan,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`minimal_mamba.scan.selective_scan`, with `torch_scan.scan` or its like between the touched positions."""
    l = u.shape[1]
    ys = []
    recorded = {site: tap.recorded(site) for site in ("decay", "state_write", "ssm_state", "state_read")}
    move = tap.toward()
    replaced = {*tap.overwritten()} - {*recorded["decay"], *recorded["state_write"]} if move is None else set()
    cuts = list(stretches(l, tap.edited(*recorded)))
    parts = zip(*(cut(x, cuts) for x in (u, dt, B, C)), strict=True)
    for (first, stop, touched), (u_s, dt_s, B_s, C_s) in zip(cuts, parts, strict=True):
        if first in replaced:  # what the state would be is not asked
            h = tap("ssm_state", h, first)
            read = tap("state_read", h, first)
            ys.append(einsum(read, C_s[:, 0].to(read.dtype), "b e n, b n -> b e")[:, None])
            continue
        if touched:
            step = tap if move is None else _Moved(tap, move, A, first)
            h, y = ssm_step(h, u_s[:, 0], dt_s[:, 0], A, B_s[:, 0], C_s[:, 0], tap=step, t=first)
            ys.append(y[:, None])
            move = step.rest if isinstance(step, _Moved) else move
            continue
        s = slice(first, stop)
        wanted = {site: [t for t in times if first <= t < stop] for site, times in recorded.items()}
        keep = sorted({*wanted["ssm_state"], *wanted["state_read"]})
        added_at, added = tap.probed(range(first, stop)) or ([], None)
        y, h, kept = scan(
            u_s, dt_s, A, B_s, C_s, h,
            keep=[t - first for t in keep], added=added, added_at=[t - first for t in added_at],
            move=None if move is None else _during(move, s), room=room(tap, keep, h),
        )  # fmt: skip
        ys.append(y)
        if move is not None and stop < l:  # an edited position follows
            with torch.no_grad():
                ends = [scan(run.u[:, s], run.dt[:, s], A, run.B[:, s], C_s, run.h)[1] for run in move.runs]
            move = _gone_on(move, ends)
        hand_over(tap, kept, keep, wanted)
        if at := wanted["decay"]:
            tap.record("decay", torch.exp(dt[:, at, :, None] * A), at)
        if at := wanted["state_write"]:
            tap.record("state_write", (dt[:, at] * u[:, at])[..., None] * B[:, at, None].to(h.dtype), at)
    return (ys[0] if len(ys) == 1 else torch.cat(ys, 1)), h  # (b, l, e)


def room(tap: Tap, keep: list[int], h: Tensor) -> Tensor | None:
    """Where the kept states can be written so that one of the recordings needs no copy."""
    rooms = (tap.room(site, keep, h) for site in READ if keep)
    return next((room for room in rooms if room is not None), None)


def hand_over(tap: Tap, kept: Tensor, keep: list[int], wanted: Mapping[str, list[int]]) -> None:
    """Give the states (b, len(keep), e, n) of positions without edits to the sites that want some of them."""
    for site in READ:
        if times := wanted[site]:
            tap.record(site, kept if times == keep else kept[:, [keep.index(t) for t in times]], times)


def taps(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y_t = bias + sum_i weight[:, i] x_{t+i}, k shifted products; x (b, k - 1 + l, e), weight (e, k) to (b, l, e)."""
    k = weight.shape[1]
    m = x.shape[1] - k + 1
    y = x[:, :m] * weight[:, 0] if bias is None else torch.addcmul(bias, x[:, :m], weight[:, 0])
    for i in range(1, k):
        y = torch.addcmul(y, x[:, i : i + m], weight[:, i])
    return y


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, *, mask: Tensor | None = None,
    tap: Tap = NO_TAP, taps: Callable[[Tensor, Tensor, Tensor | None], Tensor] = taps,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`minimal_mamba.scan.causal_conv`, by `taps` or its like between the positions that edits touch."""
    (b, l, _), k = x.shape, weight.shape[1]
    out = []
    recorded = tap.recorded("conv_state")
    cuts = list(stretches(l, sorted({*tap.edited("conv_state")} - {*tap.only_probed("conv_state")})))
    for (first, stop, touched), x_s in zip(cuts, cut(x, cuts), strict=True):
        part = None if mask is None else mask[:, first:stop]
        if touched:
            step = _At(tap, first)
            y, window = causal_conv(x_s, weight, bias, window, mask=part, tap=step)
            out.append(y)
            continue
        inputs = torch.cat([window[:, :, 1:].transpose(1, 2), x_s], 1)  # (b, k - 1 + stretch, e)
        windows = inputs.unfold(1, k, 1)  # (b, stretch, e, k), a view
        w, m = weight.to(wide(x.dtype)), stop - first
        y = taps(inputs.to(w.dtype), w, bias)  # rounded once, at the end
        tokens = torch.full((b,), m, device=x.device) if part is None else part.sum(1)  # padding comes last
        probed = tap.probed(range(first, stop), "conv_state")
        after = None
        if probed is not None:
            later, after = _added([t - first for t in probed[0]], probed[1], w, tokens, m)
            y = y + later
        out.append(y.to(x.dtype))
        if at := [t for t in recorded if first <= t < stop]:
            tap.record("conv_state", windows[:, [t - first for t in at]], at)
        if part is None:
            window = windows[:, -1].clone()  # a view would keep the whole input
        else:
            rows = torch.arange(b, device=x.device)
            window = torch.where((tokens > 0)[:, None, None], windows[rows, (tokens - 1).clamp(min=0)], window)
        window = window if after is None else window + after.to(window.dtype)
    return (out[0] if len(out) == 1 else torch.cat(out, 1)), window


def _added(at: list[int], added: Tensor, taps: Tensor, tokens: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """What is added to windows acts on later tokens: (b, m, e) of a stretch, and (b, e, k) of the window after it.

    Slot s of the window of t is slot s - j of that of t + j: conv_{t+j} += sum_s weight_{s-j} added_{t,s}.
    """
    (b, _, e, k), rows = added.shape, torch.arange(len(added), device=added.device)
    if len(at) < m:
        added = added.new_zeros(b, m, e, k).index_copy(1, torch.tensor(at, device=added.device), added)
    later, after = added.new_zeros(b, m, e), added.new_zeros(b, e, k)
    for j in range(min(k, m)):
        if j:
            acts = (added[:, : m - j, :, j:] * taps[:, : k - j]).sum(-1)
            later = later + F.pad(acts, (0, 0, j, 0))
        last = tokens - 1 - j  # of each row
        stays = added[rows, last.clamp(min=0), :, j:] * (last >= 0)[:, None, None]
        after = after + F.pad(stays, (0, j))
    return later, after


def _during(move: Toward, s: slice) -> Toward:
    """The move at some of the positions."""
    runs = tuple(ScanInputs(run.u[:, s], run.dt[:, s], run.B[:, s], run.h) for run in move.runs)
    return replace(move, size=move.size[:, s], runs=runs)


def _gone_on(move: Toward, states: list[Tensor]) -> Toward:
    """The move with its runs at later states."""
    return replace(move, runs=tuple(replace(run, h=h) for run, h in zip(move.runs, states, strict=True)))


class _Moved(Tap):
    """The tap of the readable step at t, which makes the move there, after the edits; `rest`: the move from then on."""

    def __init__(self, tap: Tap, move: Toward, A: Tensor, t: int):
        self.tap, self.move = tap, move
        taps = [_Seen(move.site) for _ in move.runs]
        after = []
        with torch.no_grad():
            for run, see in zip(move.runs, taps, strict=True):
                B = run.B[:, t]
                after.append(ssm_step(run.h, run.u[:, t], run.dt[:, t], A, B, B, tap=see)[0])
        self.seen = [see.value for see in taps]
        self.rest = _gone_on(move, after)

    def __call__(self, site: str, value: Tensor, t: int | None = None) -> Tensor:
        value, move = self.tap(site, value, t), self.move
        if site != move.site:
            return value
        donor, base = self.seen if len(self.seen) == 2 else (self.seen[0], value.detach())
        return value + move.size[:, t] * (donor - base)


class _Seen(Tap):
    """A tap that keeps the last value of one site."""

    value: Tensor

    def __init__(self, site: str):
        self.site = site

    def __call__(self, site: str, value: Tensor, t: int | None = None) -> Tensor:
        if site == self.site:
            self.value = value
        return value


class _At(Tap):
    """A tap moved along by `first` positions, for a step that counts from 0."""

    def __init__(self, tap: Tap, first: int):
        self.tap, self.first = tap, first

    def __call__(self, site: str, value: Tensor, t: int | None = None) -> Tensor:
        return self.tap(site, value, None if t is None else t + self.first)


TORCH = Ops("torch", conv, selective_scan, step=step)

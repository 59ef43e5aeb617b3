"""The `fused` backend: the kernels run whatever no edit touches, and most of what edits do to a state, in one call.

Of a layer whose states are edited or read, one scan of the whole sequence serves
    what starts from a memory or leaves one      written before the first token, read after the last
    recordings of states, edits of `state_read`  read at their positions; y of the edited ones is made anew
    gradients wanted in states                   something added at their positions, whose gradient the kernel gives
    edits that put a state in its place          the new state replaces the token (`Tap.overwritten`)
Edits that depend on what they meet (`Scale`, `Apply`, a part of the channels, `decay`, `state_write`) cut the sequence:
the state is read before them, one readable step follows, and the next stretch starts from what it gives.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from typing import Any

import torch
from einops import einsum
from torch import Tensor, nn

from minimal_mamba.errors import BackendUnavailable
from minimal_mamba.scan import Memory, Ops, causal_conv, ssm_step
from minimal_mamba.tap import NO_TAP, Tap

from .. import torch_ops
from ..torch_ops import stretches
from .kernels import NAME, Kernels, load
from .virtual import Program


def make(kernels: Callable[[], Kernels], name: str = NAME) -> Ops:
    """The backend's operations on these kernels, which are asked for when the first model runs."""

    def begin(model: nn.Module, fresh: bool, keep: bool) -> Ops:
        k = kernels()
        check(model, k)
        config: Any = model.config
        # of FalconMamba mamba-ssm's block normalises dt behind `dt_proj`, and leaves the norms out of its backward
        plain = config.mixer_rms_eps is None
        return Ops(
            name,
            partial(conv, kernels=k, fresh=fresh, keep=keep),
            partial(scan, kernels=k, fresh=fresh, keep=keep),
            block=partial(block, kernels=k) if fresh and not keep and plain else None,
            add_norm=k.add_norm,
        )

    return Ops(
        name,
        lambda *args, **kwargs: conv(*args, kernels=kernels(), **kwargs),
        lambda *args, **kwargs: scan(*args, kernels=kernels(), **kwargs),
        begin=begin,
    )


def check(model: nn.Module, kernels: Kernels) -> None:
    """Raise BackendUnavailable for a model that the kernels cannot run; the text says what to do."""
    devices, dtypes = set(), set()
    for name, p in model.named_parameters():
        devices.add(p.device)
        if not name.endswith(("A_log", ".D")) or p.dtype != torch.float32:  # those two, mamba-ssm keeps in float32
            dtypes.add(p.dtype)
    wrong = None
    if len(devices) > 1:
        wrong = f"its weights are on {_list(devices)}", "move the whole model to one device, with model.to('cuda')"
    elif (device := next(iter(devices))).type != kernels.device:
        wrong = f"its weights are on {device}", f"move the model with model.to({kernels.device!r})"
    elif len(dtypes) > 1:
        wrong = f"its weights have the types {_list(dtypes)}", "cast the whole model, as in model.to(torch.bfloat16)"
    elif (dtype := next(iter(dtypes))) not in kernels.dtypes:
        wrong = f"its weights are {dtype}", f"the kernels take {_list(kernels.dtypes)}; use backend='torch' for others"
    else:
        c: Any = model.config
        if not 2 <= c.d_conv <= 4:
            wrong = f"d_conv is {c.d_conv}", "causal-conv1d's kernels take 2, 3 and 4; use backend='torch'"
        elif c.d_state > 256:
            wrong = f"d_state is {c.d_state}", "the scan's kernel takes at most 256; use backend='torch'"
    if wrong:
        raise BackendUnavailable(f"backend='fused' cannot run this model: {wrong[0]}; {wrong[1]}.")


def _list(values: object) -> str:
    return ", ".join(sorted(map(str, values)))  # type: ignore[call-overload]


def block(
    mixer: nn.Module, x: Tensor, memory: Memory, mask: Tensor | None, tap: Tap, *, kernels: Kernels
) -> tuple[Tensor, Memory]:
    """`Mixer.forward` from a blank memory through the fused kernels, which give none back: NaN comes in its place."""
    mixed = kernels.block(mixer, x)  # (b, l, d)
    if tap.last_only:
        last = torch.full((len(x),), x.shape[1]) if mask is None else mask.sum(1)
        mixed = mixed[torch.arange(len(x), device=x.device), last.to(x.device) - 1][:, None]
    h, window = (part.new_full((), torch.nan).expand_as(part) for part in memory)
    return mixed, (h, window)


# -- the scan -----------------------------------------------------------------------------------------------------


def scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, *, tap: Tap = NO_TAP, kernels: Kernels,
    fresh: bool = False, keep: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`minimal_mamba.scan.selective_scan` through the kernels.

    Args:
        fresh: h is zeros. keep: the last state is asked for; where it is not, NaN comes in its place.
    Cost: one launch of the scan, and one more for each position that needs a readable step. Virtual tokens: n for a
        state that is written or read, n + 1 for a gradient, n + 2 for a replaced state. Everything in float32: with 16
        bits the tokens would round the states that they carry.
    """
    if tap.toward() is not None:  # needs dL/dh of every token, which the kernel's backward keeps to itself
        return torch_ops.selective_scan(u, dt, A, B, C, h, tap=tap)
    l, wide = u.shape[1], h.dtype
    u, dt, B, C = (x.to(wide) for x in (u, dt, B, C))
    replaced = tap.overwritten()
    stepped = sorted({*tap.edited("decay", "state_write", "ssm_state")} - {*replaced})
    if l == 1 and not torch.is_grad_enabled() and not tap.edited("decay", "state_write", "ssm_state", "state_read"):
        h, y = kernels.scan_step(h, u[:, 0], dt[:, 0], A, B[:, 0], C[:, 0])
        _record(tap, u, dt, A, B, h[:, None], [0], [])
        return y[:, None], h
    ys = []
    for first, stop, touched in stretches(l, stepped):
        if touched:
            h, y = ssm_step(h, u[:, first], dt[:, first], A, B[:, first], C[:, first], tap=tap, t=first)
            y = y[:, None]
        else:
            blank, needed = fresh and first == 0, stop < l or keep
            mine = [t for t in replaced if first <= t < stop]
            y, after = _stretch(u, dt, A, B, C, None if blank else h, first, stop, mine, needed, tap, kernels)
            h = h.new_full((), torch.nan).expand_as(h) if after is None else after
        ys.append(y)
    return (ys[0] if len(ys) == 1 else torch.cat(ys, 1)), h  # (b, l, e)


def _stretch(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor | None, first: int, stop: int,
    replaced: list[int], needed: bool, tap: Tap, kernels: Kernels,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """One call of the kernel, from the state h (None: zeros): y (b, stop - first, e) and, if needed, the last state."""
    late = [t for t in tap.edited("state_read") if first <= t < stop and t not in replaced]
    wanted = {*tap.recorded("ssm_state"), *tap.recorded("state_read"), *late} - {*replaced}
    reads = sorted(t for t in wanted if first <= t < stop)
    adds, added = tap.probed([t for t in range(first, stop) if t not in replaced]) or ([], None)
    program = Program(u, dt, A, B, C)
    anew: dict[int, Tensor] = {}  # y of positions at which what is read is edited
    if h is not None:
        program.write(h)
    for a, z, kind in _runs(first, stop, replaced, reads, adds):
        if kind == "replaced":
            state = tap("ssm_state", u.new_zeros(len(u), *A.shape), a)
            read = tap("state_read", state, a)
            program.replace(a, state)
            if read is not state:
                anew[a] = einsum(read, C[:, a], "b e n, b n -> b e")
        else:
            here = None if a not in adds or added is None else added[:, adds.index(a) : adds.index(a) + z - a]
            program.tokens(a, z, added=here, read=a in reads)
    with_grad = needed and torch.is_grad_enabled()
    if with_grad:
        program.read()
    y, states, last = program.run(kernels)
    if with_grad:
        assert states is not None
        states, last = states[:, :-1], states[:, -1]
    for t in late:
        assert states is not None
        read = tap("state_read", states[:, reads.index(t)], t)
        anew[t] = einsum(read, C[:, t], "b e n, b n -> b e")
    if anew:
        y = y.index_copy(1, torch.tensor([t - first for t in anew], device=y.device), torch.stack([*anew.values()], 1))
    _record(tap, u, dt, A, B, states, [*range(first, stop)], late, reads)
    return y, last if needed else None


def _runs(
    first: int, stop: int, replaced: list[int], reads: list[int], adds: list[int]
) -> Iterator[tuple[int, int, str]]:
    """Cut first..stop into runs (from, to, kind) of positions that are treated alike; a replaced one is by itself."""
    r, k, a = set(replaced), set(reads), set(adds)

    def treatment(t: int) -> tuple[bool, bool, int]:
        return t in k, t in a, t if t in r else -1

    for how, group in groupby(range(first, stop), treatment):
        times = list(group)
        yield times[0], times[-1] + 1, "replaced" if how[2] >= 0 else "tokens"


def _record(
    tap: Tap, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, states: Tensor | None, times: list[int], late: list[int],
    reads: list[int] | None = None,
) -> None:  # fmt: skip
    """Hand over what is recorded at these positions; `states` (b, p, e, n) are those of `reads`, or of all."""
    inside = {*times}
    reads = times if reads is None else reads
    for site, skip in (("ssm_state", set[int]()), ("state_read", {*late})):
        if at := [t for t in tap.recorded(site) if t in reads and t not in skip]:
            assert states is not None
            tap.record(site, states if at == reads else states[:, [reads.index(t) for t in at]], at)
    if at := [t for t in tap.recorded("decay") if t in inside]:
        tap.record("decay", torch.exp(dt[:, at, :, None] * A), at)
    if at := [t for t in tap.recorded("state_write") if t in inside]:
        tap.record("state_write", (dt[:, at] * u[:, at])[..., None] * B[:, at, None], at)


# -- the convolution ----------------------------------------------------------------------------------------------


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, *, mask: Tensor | None = None, tap: Tap = NO_TAP,
    kernels: Kernels, fresh: bool = False, keep: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`minimal_mamba.scan.causal_conv` through the kernel, and one readable step where `conv_state` is edited.

    Args:
        fresh: the window is zeros. keep: the last window is asked for; where it is not, NaN comes in its place.
    """
    (b, l, _), k = x.shape, weight.shape[1]
    edited, recorded = tap.edited("conv_state"), tap.recorded("conv_state")
    if l == 1 and mask is None and not torch.is_grad_enabled() and not edited:
        y, window = kernels.conv_step(x[:, 0], window, weight, bias)
        if recorded:
            tap.record("conv_state", window[:, None], [0])
        return y[:, None], window
    out = []
    for first, stop, touched in stretches(l, edited):
        s, part = slice(first, stop), None if mask is None else mask[:, first:stop]
        if touched:
            y, after = causal_conv(x[:, s], weight, bias, window)
            after = tap("conv_state", after, first)
            window = after if part is None else torch.where(part[:, 0, None, None], after, window)
            out.append(y)
            continue
        before = window.transpose(1, 2).to(x.dtype)  # (b, k, e)
        if fresh and first == 0:
            out.append(kernels.conv(x[:, s], weight, bias))
        else:
            out.append(kernels.conv(torch.cat([before, x[:, s]], 1), weight, bias)[:, k:])
        at = [t - first for t in recorded if first <= t < stop]
        if not at and not keep and stop == l:
            window = window.new_full((), torch.nan).expand_as(window)
            continue
        windows = torch.cat([before, x[:, s]], 1).unfold(1, k, 1)[:, 1:].to(window.dtype)  # (b, stretch, e, k)
        if at:
            tap.record("conv_state", windows[:, at], [first + t for t in at])
        if part is None:
            window = windows[:, -1].clone()  # a view would keep the whole input
        else:
            tokens = part.sum(1)  # of each row in this stretch; padding comes last
            rows = torch.arange(b, device=x.device)
            window = torch.where((tokens > 0)[:, None, None], windows[rows, (tokens - 1).clamp(min=0)], window)
    return (out[0] if len(out) == 1 else torch.cat(out, 1)), window


FUSED = make(load)

"""The base run of a sweep: what every cell has in common with it, and starts from."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from kernels_bridge import resolve
from kernels_bridge.carry import carry
from minimal_mamba import Mamba, Tap
from minimal_mamba.block import Mixer
from minimal_mamba.errors import EditError
from minimal_mamba.provenance import digest
from minimal_mamba.scan import Ops

from ..logits import Logits
from ..run import Lengths, Metric, apply_metric, known
from .functions import known_by

PROBES = 8  # noisy runs by which a metric is known
SCANNED = ("x", "u", "dt", "B", "C", "gate")


@dataclass(frozen=True, eq=False)
class Scanned:
    """A layer's inputs of conv and scan in the base run, and its gate: x, u, dt, gate (b, l, e), B, C (b, l, n)."""

    x: Tensor
    u: Tensor
    dt: Tensor  # 0 on padding
    B: Tensor
    C: Tensor
    gate: Tensor

    def states(self, mixer: Mixer, times: Tensor, h: Tensor, ops: Ops, tap: Tap, real: Tensor | None = None) -> Tensor:
        """The base run's state (c, b, e, n) after the positions `times` (c, b, m), from the one before them, h.

        Where not `real` (b, m), no time passes. `tap` is the scan's, which counts the m positions.
        """
        c, b, _ = times.shape
        times = times.clamp(max=self.dt.shape[1] - 1).to(h.device)
        at = torch.arange(b, device=h.device)[:, None], times
        u, dt, B, C = (x[at].flatten(0, 1) for x in (self.u, self.dt, self.B, self.C))
        dt = dt if real is None or real.all() else dt * real[:, :, None].to(h.device)
        return ops.scan(u, dt, mixer.A(h.dtype), B, C, h.flatten(0, 1), tap=tap)[1].unflatten(0, (c, b))

    def mixed(self, mixer: Mixer, at: tuple[Tensor, Tensor], h: Tensor, ops: Ops, tap: Tap) -> tuple[Tensor, Tensor]:
        """`mixer_out` (R, m, d) at rows and positions `at` (R, m), under edits inside the scan alone.

        h (R, e, n) is the state before them; the one after them comes too.
        """
        u, dt, B, C, gate = (x[at] for x in (self.u, self.dt, self.B, self.C, self.gate))
        y, h = ops.scan(u, dt, mixer.A(h.dtype), B, C, h, tap=tap)
        gated = torch.addcmul(y, mixer.D.to(y.dtype), u.to(y.dtype)).mul_(gate)
        mixed: Tensor = mixer.out_proj(gated.to(u.dtype))
        return mixed, h

    def window(self, start: Tensor, width: int) -> Tensor:
        """The base run's last conv inputs (c, b, e, k) before the positions `start` (c, b), newest last."""
        times = (start[..., None] + torch.arange(-width, 0)).to(self.x.device)  # (c, b, k)
        last = self.x[torch.arange(start.shape[1], device=self.x.device)[:, None], times.clamp(min=0)]
        return (last * (times >= 0)[..., None]).transpose(2, 3)

    def after(self, mixer: Mixer, delta: Tensor, first: Tensor, count: int, ops: Ops) -> Tensor:
        """How `gated` changes if the states before the positions `first` (k, b) are others by delta (k, b, e, n).

        Returns:
            (k, b, count, e), of as many positions; those beyond the last one have no meaning.
        """
        change = carry if ops.carry is None else ops.carry
        found: Tensor = change(delta, first, count, self.dt, mixer.A(delta.dtype), self.C, self.gate)
        return found.to(self.u.dtype)

    def last(self, mixer: Mixer, delta: Tensor, first: Tensor, ends: Tensor) -> Tensor:
        """How `gated` changes at the positions `ends` (k, b) alone: (k, b, e); the other arguments as of `after`.

        h = exp(A sum dt) delta: products of decays as one exponential. Of a row whose `first`
        is beyond its end nothing is meant.
        """
        row = torch.arange(first.shape[1], device=first.device)
        passed = self._still[row, (first - 1).clamp(max=self.dt.shape[1] - 1)]  # (k, b, e)
        h = delta * torch.exp(passed[..., None] * mixer.A(delta.dtype))
        y = torch.matmul(h, self.C[row, ends].to(h.dtype)[..., None])[..., 0]
        return (y * self.gate[row, ends]).to(self.u.dtype)

    @cached_property
    def _still(self) -> Tensor:
        """(b, l, e): the sum of dt over what follows each position."""
        rest = self.dt.flip(1).cumsum(1).flip(1)  # from each position on
        return torch.cat([rest[:, 1:], torch.zeros_like(rest[:, :1])], 1)


class Base:
    """The base run: its residual stream and its scans' inputs at each layer, and its memory before any position."""

    def __init__(self, model: Mamba, ids: Tensor, lengths: Lengths, backend: str):
        known(model)
        self.model, self.backend, self.ops = model, backend, resolve(backend, model.device)
        begun = self.ops.begin or (lambda model, fresh, keep: self.ops)
        self.carrying, self.passing = (
            begun(model, False, keep) for keep in (True, False)
        )  # a memory, or none, is left
        self.ids, self.sizes = model.check(ids, lengths)
        self.padded, self.depth = lengths is not None, model.config.n_layer
        self.streams: dict[int, Tensor] = {}  # stage -> (b, l, d): what enters layer `stage`, or leaves the last one
        self.layers: dict[int, Scanned] = {}
        self.at, self.memory = torch.zeros_like(self.sizes), dict[int, Tensor]()  # before these positions, states
        self.read_before = False  # whether a metric read logits before the last

    def read(self, first: int) -> None:
        """Run once and keep what later layers need from stage `first` on."""
        sites: dict[tuple[int, str], Tensor] = {}
        self.model.score(self.ids, self.sizes, None, False, True, _Kept(sites, first), self.ops)
        for layer in range(first - 1, self.depth):
            self.streams[layer + 1] = sites[layer, "resid_post" if layer >= 0 else "embed"]
        self.layers = {i: Scanned(*(sites[i, site] for site in SCANNED)) for i in range(first, self.depth)}

    def logits(self, metric: Metric, noise: torch.Generator | None = None) -> Tensor:
        """The metric of the base run; with noise, of logits that are as far from it as they are apart."""
        resid = self.streams[self.depth]

        def head(last_only: bool) -> Tensor:
            logits = self.model.head(resid, self.sizes, last_only=last_only)  # (b, 1 or l, v)
            if noise is None:
                return logits
            drawn = torch.randn(logits.shape, generator=noise).to(logits)
            return logits + logits.std().nan_to_num(nan=1.0, posinf=1.0) * drawn

        if self.padded:
            return apply_metric(metric, head(True))

        def whole() -> Tensor:
            self.read_before = self.read_before or noise is None
            return head(False)

        return apply_metric(metric, Logits(head(True)[:, 0], self.ids.shape[1], whole))

    def known_by(self, metric: Metric) -> str:
        """What tells a metric from others: what it makes of logits that nobody chose; its code, where that says all."""
        noise = torch.Generator().manual_seed(0)
        made = [self.logits(metric, noise) for _ in range(PROBES)]
        try:
            return digest(*made, known_by(metric))
        except EditError:  # it holds an object
            return digest(*made)

    def before(
        self, starts: Tensor, later: Sequence[int] = ()
    ) -> tuple[dict[int, tuple[list[Tensor], Tensor]], dict[int, dict[int, list[Tensor]]]]:
        """Each layer's memory before the positions `starts` (c, b), and its states so many tokens later.

        They are what the memory was before others, and what lies between: one scan, where the rows go on alike.

        Returns:
            {layer: (c states (b, e, n), conv inputs (c, b, e, k))}, {tokens: {layer: c states (b, e, n)}}; the states
            are views of what the scan kept
        """
        if not self.memory or bool((starts[0] < self.at).any()):
            blank = self.model.initial_state(starts.shape[1])
            self.memory, self.at = {i: blank.ssm_state[i] for i in self.layers}, torch.zeros_like(self.at)
        steps = starts - self.at  # (c, b)
        if bool((steps != steps[:, :1]).any() | (steps.diff(dim=0) < 0).any()):
            if len(starts) > 1:
                return _joined([self.before(start[None], later) for start in starts])
            self._go_on(starts[0])
            steps = torch.zeros_like(steps)
        at, gone = self.at, steps[:, 0].tolist()
        wanted = sorted({step + more for step in gone for more in (0, *later)} - {0})
        between = (at[:, None] + torch.arange(max(wanted, default=0)))[None]  # (1, b, m)
        memory, after = dict[int, tuple[list[Tensor], Tensor]](), {more: dict[int, list[Tensor]]() for more in later}
        for i, scanned in self.layers.items():
            states = States([t - 1 for t in wanted])
            if wanted:
                scanned.states(
                    self.model.backbone.layers[i].mixer, between, self.memory[i][None], self.carrying, states
                )
            found = {t + 1: h for t, h in states.found.items()} | {0: self.memory[i]}
            memory[i] = [found[t] for t in gone], scanned.window(starts, self.model.config.d_conv)
            for more in later:
                after[more][i] = [found[t + more] for t in gone]
            self.memory[i] = memory[i][0][-1].clone()  # of a view the whole would be kept
        self.at = starts[-1]
        return memory, after

    def _go_on(self, start: Tensor) -> None:
        """To the memory before the positions `start` (b,), which rows reach after different numbers of tokens."""
        between = self.at[:, None] + torch.arange(int((start - self.at).max()))  # (b, m)
        for i, scanned in self.layers.items():
            mixer, real = self.model.backbone.layers[i].mixer, between < start[:, None]
            h = scanned.states(mixer, between[None], self.memory[i][None], self.carrying, States(), real)
            self.memory[i] = h[0]
        self.at = start


def _joined(apart: list[Any]) -> Any:
    """What several calls of `Base.before` gave as that of one."""
    memories, afters = zip(*apart, strict=True)
    memory = {i: ([*chain(*(m[i][0] for m in memories))], torch.cat([m[i][1] for m in memories])) for i in memories[0]}
    return memory, {more: {i: [*chain(*(a[more][i] for a in afters))] for i in memory} for more in afters[0]}


class States(Tap):
    """Keeps the states after some positions of a scan."""

    def __init__(self, times: Sequence[int] = ()):
        self.times, self.found = sorted({*times}), dict[int, Tensor]()

    def recorded(self, *sites: str) -> list[int]:
        return self.times if "ssm_state" in sites else []

    def record(self, site: str, values: Tensor, times: Sequence[int]) -> None:
        self.found |= dict(zip(times, values.unbind(1), strict=True))

    def __call__(self, site: str, value: Tensor, t: int | None = None) -> Tensor:
        if site == "ssm_state" and t in self.times:
            self.found[t] = value
        return value


class _Kept(Tap):
    """Keeps what leaves each layer from the one before `first` on, and of each from `first` on its scan's inputs."""

    def __init__(self, kept: dict[tuple[int, str], Tensor], first: int, layer: int = -1):
        self.kept, self.first, self.layer = kept, first, layer
        self.sites = {"resid_post"} if layer >= first - 1 else set()
        self.sites |= {*SCANNED} if layer >= first else set()
        self.sites |= {"embed"} if first == 0 else set()

    def at_layer(self, layer: int) -> Tap:
        return _Kept(self.kept, self.first, layer)

    def __call__(self, site: str, value: Tensor, t: int | None = None) -> Tensor:
        if site in self.sites:
            self.kept[self.layer, site] = value
        return value

    def touches(self, *sites: str) -> bool:
        return not self.sites.isdisjoint(sites)

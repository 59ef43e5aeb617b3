"""A group of cells as one batch: rows of many cells, each from the layer and the position on that it touches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels_bridge import resolve
from minimal_mamba import SITES, Edit, Mamba, Mean, Ops, Plan, Tap
from minimal_mamba.block import Memory

from ..run import Lengths, Metric, apply_metric, run
from .carry import SCANNED, Scanned
from .logits import Logits

_NAMES = tuple(SITES)
BEFORE_CONV = ("embed", "resid_pre", "mixer_in", "x", "conv_state", "resid_post")
LATE = ("resid_pre", *_NAMES[_NAMES.index("y") :])  # of the last layer: what needs all tokens behind the scan


@dataclass(frozen=True, eq=False)
class Cell:
    """One cell, resolved: where it begins to differ from the base run."""

    number: int
    plan: Plan
    start: Tensor  # (b,) the first position that is touched; a row's last one, where none is
    stage: int  # the first layer whose input or inside is touched; n_layer: what follows the last layer
    tokens: int  # how many from the start on differ in that layer before its scan; after them only the state does


class Base:
    """The base run: its residual stream and its scans' inputs at each layer, and its memory before any position."""

    def __init__(self, model: Mamba, ids: Tensor, lengths: Lengths, backend: str):
        self.model, self.ops = model, resolve(backend, model.device)
        begun = self.ops.begin
        self.carrying = self.ops if begun is None else begun(model, False, True)  # from one memory to the next
        self.ids, self.sizes = model.check(ids, lengths)
        self.padded, self.depth = lengths is not None, model.config.n_layer
        self.streams: dict[int, Tensor] = {}  # stage -> (b, l, d): what enters layer `stage`, or leaves the last one
        self.layers: dict[int, Scanned] = {}
        self.at, self.memory = torch.zeros_like(self.sizes), dict[int, Memory]()  # before these positions
        self.read_before = False  # whether a metric read logits before the last

    def read(self, first: int) -> None:
        """Run once and keep what later layers need from stage `first` on."""
        sites: dict[tuple[int, str], Tensor] = {}
        self.model(self.ids, lengths=self.sizes, last_only=True, tap=_Kept(sites, first), ops=self.ops)
        for layer in range(first - 1, self.depth):
            self.streams[layer + 1] = sites[layer, "resid_post" if layer >= 0 else "embed"]
        self.layers = {i: Scanned(*(sites[i, site] for site in SCANNED)) for i in range(first, self.depth)}

    def logits(self, metric: Metric) -> Tensor:
        """The metric of the base run."""
        resid = self.streams[self.depth]
        last = self.model.head(resid, self.sizes, last_only=True)  # (b, 1, v)
        if self.padded:
            return apply_metric(metric, last)

        def whole() -> Tensor:
            self.read_before = True
            return self.model.head(resid, self.sizes)

        return apply_metric(metric, Logits(last[:, 0], self.ids.shape[1], whole))

    def pass_by(self, group: Sequence[Cell]) -> list[dict[int, Memory]]:
        """The memory before each of a group's starts; a group that is not run again is passed by in the same steps,
        so that what follows has the same numbers to the bit."""
        return [self.before(torch.tensor(start)) for start in _columns(group)]

    def before(self, start: Tensor) -> dict[int, Memory]:
        """Each layer's memory before the positions `start` (b,): what it was before others, and what lies between."""
        if not self.memory or bool((start < self.at).any()):
            blank = self.model.initial_state(len(start))
            self.memory = {i: (blank.ssm_state[i], blank.conv_state[i]) for i in self.layers}
            self.at = torch.zeros_like(start)
        between = self.at[:, None] + torch.arange(int((start - self.at).max()))  # (b, m)
        width = self.model.config.d_conv
        for i, scanned in self.layers.items():
            mixer, h = self.model.backbone.layers[i].mixer, self.memory[i][0]
            if between.shape[1]:
                h = scanned.states(mixer, between[None], h[None], self.carrying, between < start[:, None])[0]
            self.memory[i] = h, scanned.window(start, width)
        self.at = start
        return dict(self.memory)


def _columns(group: Sequence[Cell]) -> dict[tuple[int, ...], int]:
    """The different starts of a group's cells, in order, and the number of each."""
    starts = sorted({tuple(c.start.tolist()) for c in group}, key=lambda start: (sum(start), start))
    return {start: i for i, start in enumerate(starts)}


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


def begin(base: Base, number: int, edits: Sequence[Edit]) -> Cell:
    """Where a cell begins; raises what `run` would."""
    depth, sizes, (_, l) = base.depth, base.sizes, base.ids.shape
    plan = Plan(base.model.config, edits, (), torch.zeros_like(sizes), sizes)
    items = plan.edits()
    stage = min((_stage(item.site, layer, depth) for item in items for layer in item.layers), default=depth)
    start, stop = sizes - 1, torch.zeros_like(sizes)
    for item in items:
        rows = item.rows[item.write]
        start = start.scatter_reduce(0, rows, item.pos.where(item.pos >= 0, l).amin(1)[item.write], "amin")
        if any(_stage(item.site, layer, depth) == stage for layer in item.layers):
            further = base.model.config.d_conv - 1 if item.site in BEFORE_CONV else 0
            stop = stop.scatter_reduce(0, rows, item.pos.amax(1)[item.write] + 1 + further, "amax")
    return Cell(number, plan, start, stage, max(1, int((stop - start).max())))


def _stage(site: str, layer: int | None, depth: int) -> int:
    if layer is None:
        return 0 if site == "embed" else depth  # final_norm, logits
    return layer + 1 if site == "resid_post" else layer


def alone(cell: Cell) -> bool:
    """Whether an edit would see the rows of other cells."""
    return any(isinstance(item.edit, Mean) and item.edit.mean is None for item in cell.plan.edits())


def run_group(
    base: Base, group: Sequence[Cell], edits: Sequence[Sequence[Edit]], lengths: Lengths
) -> Iterator[tuple[int, Tensor]]:
    """(number, logits) of each cell of a group, the logits as a metric takes them."""
    if alone(group[0]):
        for cell in group:
            out = run(
                base.model, base.ids, edits[cell.number], lengths=lengths, backend=base.ops.name, last_only=base.padded
            )
            yield cell.number, out.logits
        return
    b, (_, l) = len(base.ids), base.ids.shape
    group = sorted(group, key=lambda c: c.stage)
    batch = Batch(base, group)
    resid = batch.run()  # (rows, m, d), or (rows, 1, d)
    sizes = batch.sizes.clamp(max=resid.shape[1])
    whole = batch.plan.touches("final_norm", "logits")
    head = partial(base.model.head, tap=batch.plan)
    suffix = head(resid, sizes) if whole else None  # (rows, m, v)
    ends = (torch.arange(len(resid)), sizes - 1)
    last = head(resid, sizes, last_only=True)[:, 0] if suffix is None else suffix[ends]
    batch.results()

    def every(first: int) -> Tensor:
        """(b, l, v): up to the first touched position the base run's."""
        if batch.narrow:  # a metric that reads more here than it did of the base run
            return run(base.model, base.ids, edits[group[first // b].number], backend=base.ops.name).logits
        mine = slice(first, first + b)
        logits = base.model.head(base.streams[base.depth], base.sizes)
        after = base.model.head(resid[mine], batch.sizes[mine]) if suffix is None else suffix[mine]
        for row, start in enumerate(batch.start[mine].tolist()):
            logits[row, start:] = after[row, : l - start]
        return logits

    for k, cell in enumerate(group):
        own = last[k * b : (k + 1) * b]
        yield cell.number, own[:, None] if base.padded else Logits(own, l, partial(every, k * b))


class Batch:
    """A group as one batch: row k b + i is row i of its k-th cell, from its first touched position on."""

    def __init__(self, base: Base, group: Sequence[Cell]):
        self.base, b, l, depth = base, len(base.ids), base.ids.shape[1], base.depth
        self.start = torch.cat([c.start for c in group])  # (rows,)
        self.sizes = base.sizes.repeat(len(group)) - self.start
        stages = torch.tensor([c.stage for c in group])  # ascending: at each layer, the first rows have entered
        self.entered = [b * int((stages <= i).sum()) for i in range(-1, depth + 1)]  # of layer i at i + 1
        self.first, self.length = int(stages[0]), int(self.sizes.max())
        at = base.ids.device
        self.row = torch.arange(b).repeat(len(group))[:, None].to(at)  # (rows, 1)
        self.times = (self.start[:, None] + torch.arange(self.length)).clamp(max=l - 1).to(at)  # (rows, m)
        self.ends = (torch.arange(len(self.start)), self.sizes - 1)
        columns = _columns(group)
        self.columns = torch.tensor([*columns])  # (columns, b)
        self.column = torch.tensor([columns[tuple(c.start.tolist())] for c in group]).repeat_interleave(b).to(at)
        self.before = base.pass_by(group)
        self.plan = Plan(base.model.config, (), (), self.start, self.start + self.sizes)
        self.heads: dict[int, tuple[int, Plan]] = {}  # stage -> tokens that run whole there, and the edits in them
        for k, cell in enumerate(group):
            if cell.stage not in self.heads:
                new = self.new(cell.stage)
                tokens = min(self.length, max(c.tokens for c in group if c.stage == cell.stage))
                tokens = self.length if cell.stage == depth else tokens
                plan = Plan(base.model.config, (), (), self.start[new], (self.start + self.sizes)[new])
                self.heads[cell.stage] = tokens, plan
            own, rest = partial(_own, True, cell.stage, depth), partial(_own, False, cell.stage, depth)
            self.heads[cell.stage][1].beside(cell.plan, k * b - self.new(cell.stage).start, own)
            self.plan.beside(cell.plan, k * b, rest)
        late = self.plan.at_layer(depth - 1).touches(*LATE) or self.plan.touches("final_norm", "logits")
        self.narrow = self.first < depth and not late and not base.read_before  # of the last layer only the last token

    def new(self, stage: int) -> slice:
        """The rows that enter at a stage."""
        return slice(self.entered[stage], self.entered[stage + 1])

    def results(self) -> None:
        """Raises NotReached for an edit that did not happen."""
        for plan in (self.plan, *(plan for _, plan in self.heads.values())):
            plan.results()

    def run(self) -> Tensor:
        """The residual stream (rows, m, d) after the last layer, or that of the last token (rows, 1, d)."""
        model, depth, ops = self.base.model, self.base.depth, self.base.carrying
        self.plan.begin(self.start, self.sizes)
        resid: Tensor | None = None
        for i in range(self.first, depth):
            tap, narrow = self.plan.at_layer(i), self.narrow and i == depth - 1
            found = None if i not in self.heads else self.enter(i, narrow, ops)
            if resid is None:
                assert found is not None
                resid = tap("resid_post", found)
                continue
            layer, n = model.backbone.layers[i], len(resid)
            normal = layer.norm(resid) if narrow else None
            joined = _Last(tap, self.ends, n) if narrow else tap
            stream = resid[joined.ends][:, None] if isinstance(joined, _Last) else resid
            resid, *_ = layer(stream, self.memory(i, slice(n)), None, _Joined(joined, found), ops, normal)
        if depth in self.heads:
            plan = self.heads[depth][1]
            new = self.new(depth)
            plan.begin(self.start[new], self.sizes[new])
            late = plan.at_layer(depth - 1)("resid_post", self.stream(depth, new, slice(None)))
            if self.narrow:
                late = late[torch.arange(len(late)), self.sizes[new] - 1][:, None]
            resid = late if resid is None else torch.cat([resid, late])
        assert resid is not None
        return resid

    def stream(self, stage: int, rows: slice, tokens: slice) -> Tensor:
        """The base run's residual stream (rows, tokens, d) before a layer."""
        return self.base.streams[stage][self.row[rows], self.times[rows, tokens]]

    def memory(self, layer: int, rows: slice) -> tuple[Tensor, Tensor]:
        """The memory of a layer before the first token of some rows."""
        h, window = (torch.stack([before[layer][part] for before in self.before]) for part in (0, 1))
        at = self.column[rows], self.row[rows, 0]
        return h[at], window[at]

    def enter(self, i: int, narrow: bool, ops: Ops) -> Tensor:
        """What leaves the layer in which rows begin to differ: (rows, m, d), or of the last token (rows, 1, d).

        Their first tokens run through the layer as always. Those that follow have the base run's inputs, and so all
        that the layer makes of them is the base run's but for the state, in which the layer is linear.
        """
        tokens, plan = self.heads[i]
        new, layer = self.new(i), self.base.model.backbone.layers[i]
        start, sizes = self.start[new], self.sizes[new]
        plan.begin(start, sizes.clamp(max=tokens))
        here = slice(tokens)
        resid = (
            self.stream(i, new, here)
            if i
            else self.base.model.embed(self.base.ids[self.row[new], self.times[new, here]], plan)
        )
        if i:
            resid = plan.at_layer(i - 1)("resid_post", resid)
        out, _, (h, _) = layer(resid, self.memory(i, new), None, plan.at_layer(i), ops)
        if tokens == self.length:
            return out[torch.arange(len(out)), sizes - 1][:, None] if narrow else out
        scanned, mixer = self.base.layers[i], layer.mixer
        there = self.columns[:, :, None] + torch.arange(tokens)
        delta = (
            h
            - scanned.states(mixer, there, torch.stack([b[i][0] for b in self.before]), ops)[
                self.column[new], self.row[new, 0]
            ]
        )
        carry = scanned.last if narrow else scanned.after
        gated = carry(mixer, delta, self.row[new, 0], self.times[new], sizes, tokens)
        moved = F.linear(gated, mixer.out_proj.weight)
        if not narrow:
            return torch.cat([out, self.stream(i + 1, new, slice(tokens, None)) + moved], 1)
        ends = torch.arange(len(out)), sizes.clamp(max=tokens) - 1
        at = self.row[new, 0], self.times[new][torch.arange(len(out)), sizes - 1]
        after = self.base.streams[i + 1][at] + moved
        return out[ends].where((sizes <= tokens)[:, None].to(out.device), after)[:, None]


def _own(wanted: bool, stage: int, depth: int, site: str, layer: int | None) -> bool:
    """Whether a cell's edit acts before or in the layer in which its rows begin to differ, as is `wanted`."""
    return (_stage(site, layer, depth) == stage and site not in ("final_norm", "logits")) == wanted


class _Joined(Tap):
    """A layer's tap of a group, at whose `resid_post` the rows join that began in this layer."""

    def __init__(self, tap: Tap, new: Tensor | None):
        self.tap, self.new = tap, new

    def __call__(self, site: str, value: Tensor, t: int | None = None) -> Tensor:
        if site == "resid_post" and self.new is not None:
            value = torch.cat([value, self.new])
        return self.tap(site, value, t)

    def edited(self, *sites: str) -> list[int]:
        return self.tap.edited(*sites)

    def overwritten(self) -> list[int]:
        return self.tap.overwritten()

    def touches(self, *sites: str) -> bool:
        return self.tap.touches(*sites)


class _Last(_Joined):
    """A tap that lets only the last token of each row go on behind the scan."""

    def __init__(self, tap: Tap, ends: tuple[Tensor, Tensor], rows: int):
        super().__init__(tap, None)
        self.ends = ends[0][:rows], ends[1][:rows]

    def __call__(self, site: str, value: Tensor, t: int | None = None) -> Tensor:
        value = self.tap(site, value, t)
        return value[self.ends][:, None] if site in ("y", "skip", "gate") else value

    def touches(self, *sites: str) -> bool:
        return sites != ("resid_pre",)  # line by line, so that what is narrowed passes by here

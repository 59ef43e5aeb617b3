"""A group of cells as one batch: rows of many cells, each from the layer and the position on that it touches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from minimal_mamba import SITES, Edit, Plan, Tap

from ..logits import Logits
from ..run import Lengths, run
from .base import Base

_NAMES = tuple(SITES)
RECURRENCE = ("decay", "state_write", "ssm_state", "state_read")
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


def starts(base: Base, group: Sequence[Cell]) -> tuple[Tensor, list[int]]:
    """The different starts of a group's cells (c, b), in order, and after how many tokens only the state differs."""
    found = sorted({tuple(c.start.tolist()) for c in group}, key=lambda start: (sum(start), start))
    return torch.tensor(found), sorted({*_heads(base, group).values()} - {_length(base, group)})


def _length(base: Base, group: Sequence[Cell]) -> int:
    return int(max((base.sizes - c.start).max() for c in group))


def _heads(base: Base, group: Sequence[Cell]) -> dict[int, int]:
    """Stage -> tokens of its cells that run whole there."""
    most, found = _length(base, group), dict[int, int]()
    for c in group:
        found[c.stage] = max(found.get(c.stage, 0), most if c.stage == base.depth else min(c.tokens, most))
    return found


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
    return any(item.edit is not None and item.edit.over_batch for item in cell.plan.edits())


def run_group(
    base: Base, group: Sequence[Cell], edits: Sequence[Sequence[Edit]], lengths: Lengths
) -> Iterator[tuple[int, Tensor]]:
    """(number, logits) of each cell of a group, the logits as a metric takes them."""
    if alone(group[0]):
        for cell in group:
            out = run(
                base.model, base.ids, edits[cell.number], lengths=lengths, backend=base.backend, last_only=base.padded
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
            return run(base.model, base.ids, edits[group[first // b].number], backend=base.backend).logits
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
        self.first, self.length = int(stages[0]), _length(base, group)
        at = base.ids.device
        self.row = torch.arange(b).repeat(len(group))[:, None].to(at)  # (rows, 1)
        self.times = (self.start[:, None] + torch.arange(self.length)).clamp(max=l - 1).to(at)  # (rows, m)
        self.ends = torch.arange(len(self.start)), self.sizes - 1
        columns, later = starts(base, group)  # (c, b)
        number = {tuple(start): i for i, start in enumerate(columns.tolist())}
        self.column = [number[tuple(c.start.tolist())] for c in group]  # of each cell
        self.before, self.after = base.before(columns, later)
        spared = base.passing.block is not None  # the padding; line by line a mask costs more than that
        self.mask = base.model.mask(self.sizes, self.length) if spared else None
        self.plan = Plan(base.model.config, (), (), self.start, self.start + self.sizes)
        self.heads: dict[int, tuple[int, Plan]] = {}  # stage -> tokens that run whole there, and the edits in them
        for stage, tokens in _heads(base, group).items():
            new = self.new(stage)
            plan = Plan(base.model.config, (), (), self.start[new], (self.start + self.sizes)[new])
            self.heads[stage] = tokens, plan
        for k, cell in enumerate(group):
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
        model, depth, ops = self.base.model, self.base.depth, self.base.passing
        self.plan.begin(self.start, self.sizes)
        resid: Tensor | None = None
        for i in range(self.first, depth):
            tap, narrow = self.plan.at_layer(i), self.narrow and i == depth - 1
            found = None if i not in self.heads else self.enter(i, narrow)
            if resid is None:
                assert found is not None
                resid = tap("resid_post", found)
                continue
            layer, n = model.backbone.layers[i], len(resid)
            normal, mask = layer.norm(resid) if narrow else None, None if self.mask is None else self.mask[:n]
            joined = _Last(tap, found, (self.ends[0][:n], self.ends[1][:n])) if narrow else _Joined(tap, found)
            stream = resid[joined.ends][:, None] if isinstance(joined, _Last) else resid
            resid, *_ = layer(stream, self.memory(i, slice(n)), mask, joined, ops, normal)
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
        b = len(self.base.ids)
        cells = self.column[(rows.start or 0) // b : rows.stop // b]
        h, window = self.before[layer]  # c times (b, e, n), (c, b, e, k)
        return torch.cat([h[c] for c in cells]), window[cells].flatten(0, 1)

    def enter(self, i: int, narrow: bool) -> Tensor:
        """What leaves the layer in which rows begin to differ: (rows, m, d), or of the last token (rows, 1, d).

        Their first tokens run through the layer as always. Those that follow have the base run's inputs, and so all
        that the layer makes of them is the base run's but for the state, in which the layer is linear.
        """
        tokens, plan = self.heads[i]
        new, model, b = self.new(i), self.base.model, len(self.base.ids)
        layer, start, sizes = model.backbone.layers[i], self.start[new], self.sizes[new]
        scanned, mixer, cells = self.base.layers[i], layer.mixer, slice(new.start // b, new.stop // b)
        plan.begin(start, sizes.clamp(max=tokens))
        tap, memory, ops, here = plan.at_layer(i), self.memory(i, new), self.base.carrying, slice(tokens)
        if {site for site, _ in plan.items} <= {*RECURRENCE}:  # all before the scan is the base run's
            mixed, h = scanned.mixed(mixer, (self.row[new], self.times[new, here]), memory[0], ops, tap)
            out = self.stream(i, new, here) + mixed
        else:
            resid = plan.at_layer(i - 1)("resid_post", self.stream(i, new, here)) if i else self.embed(new, here, plan)
            out, _, (h, _) = layer(resid, memory, None, tap, ops)
        ends = torch.arange(len(out)), sizes.clamp(max=tokens) - 1
        if tokens == self.length:
            return out[ends][:, None] if narrow else out
        without = [self.after[tokens][i][c] for c in self.column[cells]]
        delta = h.unflatten(0, (-1, b)) - torch.stack(without)  # (k, b, e, n)
        first = (start + tokens).view(-1, b).to(h.device)
        if not narrow:
            moved = F.linear(scanned.after(mixer, delta, first, self.length - tokens, ops), mixer.out_proj.weight)
            return torch.cat([out, self.stream(i + 1, new, slice(tokens, None)).add_(moved.flatten(0, 1))], 1)
        at = self.row[new, 0], self.times[new][torch.arange(len(out)), sizes - 1]
        gated = scanned.last(mixer, delta, first, at[1].view(-1, b))
        after = self.base.streams[i + 1][at] + F.linear(gated, mixer.out_proj.weight).flatten(0, 1)
        return out[ends].where((sizes <= tokens)[:, None].to(out.device), after)[:, None]

    def embed(self, rows: slice, tokens: slice, tap: Tap) -> Tensor:
        """The residual stream (rows, tokens, d) before the first layer, under edits."""
        return self.base.model.embed(self.base.ids[self.row[rows], self.times[rows, tokens]], tap)


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
    """Such a tap that lets only the last token of each row, at `ends`, go on behind the scan."""

    last_only = True

    def __init__(self, tap: Tap, new: Tensor | None, ends: tuple[Tensor, Tensor]):
        super().__init__(tap, new)
        self.ends = ends

    def __call__(self, site: str, value: Tensor, t: int | None = None) -> Tensor:
        value = super().__call__(site, value, t)
        return value[self.ends][:, None] if site in ("y", "skip", "gate") else value

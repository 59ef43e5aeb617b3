"""A group of cells as one batch: rows of many cells, each from the layer and the position on that it touches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels_bridge import resolve
from minimal_mamba import Edit, Mamba, MambaState, Mean, Ops, Plan, Tap

from ..run import Lengths, Metric, apply_metric, run
from .logits import Logits


@dataclass(frozen=True, eq=False)
class Cell:
    """One cell, resolved: where it begins to differ from the base run."""

    number: int
    plan: Plan
    start: Tensor  # (b,) the first position that is touched; a row's last one, where none is
    stage: int  # the first layer whose input or inside is touched; n_layer: what follows the last layer


class Base:
    """The base run: its residual stream at each layer, and its memory before any position."""

    def __init__(self, model: Mamba, ids: Tensor, lengths: Lengths, backend: str):
        self.model, self.ops = model, resolve(backend, model.device)
        self.ids, self.sizes = model.check(ids, lengths)
        self.padded, self.depth = lengths is not None, model.config.n_layer
        self.streams: dict[int, Tensor] = {}  # stage -> (b, l, d): what enters layer `stage`, or leaves the last one
        self.state = model.initial_state(len(self.ids))

    def read(self, first: int) -> None:
        """Run once and keep the residual stream from stage `first` on."""
        tap = _Streams(self.streams, first)
        self.model(self.ids, lengths=self.sizes, last_only=True, tap=tap, ops=self.ops)

    def logits(self, metric: Metric) -> Tensor:
        """The metric of the base run."""
        resid = self.streams[self.depth]
        last = self.model.head(resid, self.sizes, last_only=True)  # (b, 1, v)
        if self.padded:
            return apply_metric(metric, last)
        return apply_metric(metric, Logits(last[:, 0], self.ids.shape[1], lambda: self.model.head(resid, self.sizes)))

    def pass_by(self, group: Sequence[Cell]) -> list[list[tuple[Tensor, Tensor]]]:
        """The memory before each of a group's starts; a group that is not run again is passed by in the same steps,
        so that what follows has the same numbers to the bit."""
        return [self.before(torch.tensor(start)) for start in _columns(group)]

    def before(self, start: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each layer's memory before the positions `start` (b,): what it was before others, and what lies between."""
        at = self.state.position
        if bool((start < at).any()):
            self.state, at = self.model.initial_state(len(start)), torch.zeros_like(start)
        rows = (start > at).nonzero()[:, 0]
        if len(rows):
            steps = start[rows] - at[rows]
            times = (at[rows, None] + torch.arange(int(steps.max()))).clamp(max=self.ids.shape[1] - 1)
            here = rows.to(self.ids.device)
            h, window = (tuple(part[here] for part in parts) for parts in _parts(self.state))
            mine = MambaState(h, window, at[rows])
            ids = self.ids[here[:, None], times.to(self.ids.device)]
            after = self.model(ids, state=mine, lengths=steps, keep_state=True, last_only=True, ops=self.ops).state
            assert after is not None
            if len(rows) < len(start):
                h, window = (
                    tuple(old.index_copy(0, here, new) for old, new in zip(olds, news, strict=True))
                    for olds, news in zip(_parts(self.state), _parts(after), strict=True)
                )
                after = MambaState(h, window, start.clone())
            self.state = after
        return list(zip(*_parts(self.state), strict=True))


def _columns(group: Sequence[Cell]) -> dict[tuple[int, ...], int]:
    """The different starts of a group's cells, in order, and the number of each."""
    starts = sorted({tuple(c.start.tolist()) for c in group}, key=lambda start: (sum(start), start))
    return {start: i for i, start in enumerate(starts)}


def _parts(state: MambaState) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return state.ssm_state, state.conv_state


class _Streams(Tap):
    """Keeps the residual stream that leaves each layer, in `kept` under the number of the next one."""

    def __init__(self, kept: dict[int, Tensor], first: int, layer: int = -1):
        self.kept, self.first, self.layer = kept, first, layer

    def at_layer(self, layer: int) -> Tap:
        return _Streams(self.kept, self.first, layer)

    def __call__(self, site: str, value: Tensor, t: int | None = None) -> Tensor:
        if site == "resid_post" and self.layer + 1 >= self.first:
            self.kept[self.layer + 1] = value
        return value

    def touches(self, *sites: str) -> bool:
        return "resid_post" in sites


def begin(base: Base, number: int, edits: Sequence[Edit]) -> Cell:
    """Where a cell begins; raises what `run` would."""
    depth, sizes = base.depth, base.sizes
    plan = Plan(base.model.config, edits, (), torch.zeros_like(sizes), sizes)
    stage, start = depth, sizes - 1
    for item in plan.edits():
        stage = min(stage, *(_stage(item.site, layer, depth) for layer in item.layers))
        touched = item.pos.where(item.pos >= 0, base.ids.shape[1]).amin(1)[item.write]
        start = start.scatter_reduce(0, item.rows[item.write], touched, "amin")
    return Cell(number, plan, start, stage)


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
    batch = _Batch(base, group)
    resid = batch.run(base.ops)  # (rows, m, d)
    whole = batch.plan.touches("final_norm", "logits")
    head = partial(base.model.head, tap=batch.plan)
    suffix = head(resid, batch.sizes) if whole else None  # (rows, m, v)
    ends = (torch.arange(len(resid)), batch.sizes - 1)
    last = head(resid, batch.sizes, last_only=True)[:, 0] if suffix is None else suffix[ends]
    batch.plan.results()

    def every(first: int) -> Tensor:
        """(b, l, v): up to the first touched position the base run's."""
        mine = slice(first, first + b)
        logits = base.model.head(base.streams[base.depth], base.sizes)
        after = base.model.head(resid[mine], batch.sizes[mine]) if suffix is None else suffix[mine]
        for row, start in enumerate(batch.start[mine].tolist()):
            logits[row, start:] = after[row, : l - start]
        return logits

    for k, cell in enumerate(group):
        own = last[k * b : (k + 1) * b]
        yield cell.number, own[:, None] if base.padded else Logits(own, l, partial(every, k * b))


class _Batch(Tap):
    """A group as one batch: row k b + i is row i of its k-th cell, from its first touched position on."""

    def __init__(self, base: Base, group: Sequence[Cell]):
        self.base, b = base, len(base.ids)
        self.start = torch.cat([c.start for c in group])  # (rows,)
        self.sizes = base.sizes.repeat(len(group)) - self.start
        stages = torch.tensor([c.stage for c in group])  # ascending: at each layer, the first rows have entered
        self.entered = [b * int((stages <= i).sum()) for i in range(base.depth + 1)]
        self.first = int(stages[0])
        self.length = int(self.sizes.max())
        times = self.start[:, None] + torch.arange(self.length)
        self.row = torch.arange(b).repeat(len(group))[:, None].to(base.ids.device)
        self.times = times.clamp(max=base.ids.shape[1] - 1).to(base.ids.device)  # (rows, m)
        columns = _columns(group)
        self.column = torch.tensor([columns[tuple(c.start.tolist())] for c in group]).to(base.ids.device)
        self.before = base.pass_by(group)
        self.plan = Plan(base.model.config, (), (), self.start, self.start + self.sizes)
        for k, cell in enumerate(group):
            self.plan.beside(cell.plan, k * b)

    def run(self, ops: Ops) -> Tensor:
        """The residual stream (rows, m, d) after the last layer."""
        model, i = self.base.model, self.first
        if ops.begin is not None:
            ops = ops.begin(model, False, False)
        mask = model.mask(self.sizes, self.length)
        self.plan.begin(self.start, self.sizes)
        if i == 0:
            new = slice(self.entered[0])
            resid = model.embed(self.base.ids[self.row[new], self.times[new]], self.plan)
        else:
            resid = _Entering(self, i - 1)("resid_post", self.base.streams[i][:0, : self.length])
        for i in range(self.first, self.base.depth):
            n = self.entered[i]
            tap = _Entering(self, i)
            resid, *_ = model.backbone.layers[i](resid, self.memory(i, n), None if mask is None else mask[:n], tap, ops)
        return resid

    def memory(self, layer: int, rows: int) -> tuple[Tensor, Tensor]:
        """The memory of a layer before the first token of its first rows."""
        which = self.column[: rows // len(self.base.ids)]
        h, window = (
            torch.stack([before[layer][part] for before in self.before])[which].flatten(0, 1) for part in (0, 1)
        )
        return h, window


class _Entering(Tap):
    """A layer's tap of a group, at whose `resid_post` the rows enter that begin behind it."""

    def __init__(self, batch: _Batch, layer: int):
        self.batch, self.layer, self.tap = batch, layer, batch.plan.at_layer(layer)

    def __call__(self, site: str, value: Tensor, t: int | None = None) -> Tensor:
        if site == "resid_post" and len(value) < (n := self.batch.entered[self.layer + 1]):
            new = slice(len(value), n)
            stream = self.batch.base.streams[self.layer + 1]
            value = torch.cat([value, stream[self.batch.row[new], self.batch.times[new]]])
        return self.tap(site, value, t)

    def edited(self, *sites: str) -> list[int]:
        return self.tap.edited(*sites)

    def overwritten(self) -> list[int]:
        return self.tap.overwritten()

    def touches(self, *sites: str) -> bool:
        return self.tap.touches(*sites)

"""`sweep`: many runs, each under its own edits, of which nothing is computed twice.

A cell is a list of edits. Before the first layer and the first position that it touches it is the base run, so a cell
is run from there on only: its rows start at that position, from the memory that the base run had there, and enter the
forward at that layer, with the base run's residual stream. Rows of many cells make one padded batch, a group, which
grows from layer to layer as cells enter.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import overload

import torch
from torch import Tensor
from tqdm import tqdm

from kernels_bridge import resolve
from minimal_mamba import Edit, Mamba, MambaState, Mean, Ops, Plan, Tap
from minimal_mamba.block import wide
from minimal_mamba.errors import InputError

from ..run import Lengths, Metric, apply_metric, run
from .logits import Logits

TOKENS = 8192  # of a group: enough for the machine to be busy, few enough for the cache
EVEN = 0.8  # the shortest row of a group is at least this much of the longest: the rest is padding
MEMORY = 1 << 30  # bytes


@dataclass(frozen=True, eq=False)
class Sweep:
    """What a sweep gave.

    Args:
        values: (cells, b) the metric of a run under each cell's edits. base: (b,) that of the run without edits.
        backend: the operations that ran. groups: the cells that ran together, by number.
    """

    values: Tensor
    base: Tensor
    backend: str
    groups: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Cell:
    """One cell, resolved: where it begins to differ from the base run."""

    number: int
    plan: Plan
    start: Tensor  # (b,) the first position that is touched; a row's last one, where none is
    stage: int  # the first layer whose input or inside is touched; n_layer: what follows the last layer


@overload
def sweep(
    model: Mamba, ids: Tensor, cells: Sequence[Edit | Iterable[Edit]], metric: Metric, *, lengths: Lengths = None,
    backend: str = "auto", memory: int = MEMORY, progress: bool = True, path: str | Path | None = None,
) -> Sweep: ...  # fmt: skip
@overload
def sweep(
    model: Mamba, ids: Tensor, cells: Sequence[Edit | Iterable[Edit]], metric: Mapping[str, Metric], *,
    lengths: Lengths = None, backend: str = "auto", memory: int = MEMORY, progress: bool = True,
    path: str | Path | None = None,
) -> dict[str, Sweep]: ...  # fmt: skip
@torch.no_grad()
def sweep(
    model: Mamba,
    ids: Tensor,
    cells: Sequence[Edit | Iterable[Edit]],
    metric: Metric | Mapping[str, Metric],
    *,
    lengths: Lengths = None,
    backend: str = "auto",
    memory: int = MEMORY,
    progress: bool = True,
    path: str | Path | None = None,
) -> Sweep | dict[str, Sweep]:
    """Run the model once under each cell's edits, and keep what metrics make of the logits.

    Args:
        ids: (b, l) token ids.
        cells: of each run its edits, as `run` takes them.
        metric: logits (b, l, v) -> (b,), or several by name; with `lengths` it is given each row's last token,
            (b, 1, v). What it takes of the last position, `logits[:, -1]`, is made for all cells at once; the logits
            before it are made only if a metric asks for them, one cell at a time.
        lengths: (b,) real tokens in each row of a right-padded batch.
        memory: bytes that the sweep may take beside the model, the cells and what it returns. It decides how many
            cells run together, and nothing else.
        path: a folder to save each group in, as soon as it is done; a sweep that was interrupted goes on from there,
            to the same numbers.
    Returns:
        Sweep, or one for each name. Each row of `values` is what `run(model, ids, edits=cell)` would give.
    Raises:
        what `run` raises for any cell, before anything runs; MetricError; InputError for a memory that holds no cell.
    Cost: a third of a run for each cell of a grid of layers and positions; a cell with a `Mean` of the batch is run
        alone, and whole.
    """
    named = metric if isinstance(metric, Mapping) else {"metric": metric}
    made = run_cells(model, ids, [_each(cell) for cell in cells], named, lengths, backend, memory, progress, path)
    return made if isinstance(metric, Mapping) else made["metric"]


def run_cells(
    model: Mamba, ids: Tensor, todo: Sequence[Sequence[Edit]], named: Mapping[str, Metric], lengths: Lengths,
    backend: str, memory: int, progress: bool, path: str | Path | None,
) -> dict[str, Sweep]:  # fmt: skip
    """`sweep`, of metrics by name."""
    if not named:
        raise InputError("no metric is given: name at least one, logits (b, l, v) -> (b,).")
    base = Base(model, ids, lengths, backend)
    resolved = [_resolve(base, number, edits) for number, edits in enumerate(todo)]
    groups = list(_groups(base, resolved, memory))
    base.read(min((c.stage for g in groups for c in g), default=base.depth))
    values = {name: base.logits(fn) for name, fn in named.items()}
    out = {name: v.expand(len(todo), -1).clone() for name, v in values.items()}
    with tqdm(total=len(todo), desc="sweep", disable=not progress) as bar:
        for group in groups:
            for cell, logits in run_group(base, group, todo, lengths):
                for name, fn in named.items():
                    out[name][cell] = apply_metric(fn, logits)
            bar.update(len(group))
        bar.update(bar.total - bar.n)  # cells without edits
    members = tuple(tuple(c.number for c in group) for group in groups)
    return {name: Sweep(out[name], values[name], base.ops.name, members) for name in named}


def _each(cell: Edit | Iterable[Edit]) -> tuple[Edit, ...]:
    return (cell,) if isinstance(cell, Edit) else tuple(cell)


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


def _resolve(base: Base, number: int, edits: Sequence[Edit]) -> Cell:
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


def _alone(cell: Cell) -> bool:
    """Whether an edit would see the rows of other cells."""
    return any(isinstance(item.edit, Mean) and item.edit.mean is None for item in cell.plan.edits())


def need(base: Base, rows: int, tokens: int, columns: int) -> int:
    """Bytes that a group takes at most: its activations, its states, and the memory of the base run where it starts."""
    c, b = base.model.config, len(base.ids)
    size = torch.finfo(wide(base.model.dtype)).bits // 8
    a_token = 3 * c.d_model + 10 * c.d_inner + c.rank + 2 * c.d_state
    states = 4 * rows + (columns + 2) * b * base.depth
    return size * (rows * tokens * a_token + states * c.d_inner * (c.d_state + c.d_conv) + rows * c.padded_vocab)


def _groups(base: Base, cells: Sequence[Cell], memory: int) -> Iterator[list[Cell]]:
    """Cells that run together: those that start near one another, as many as the memory holds."""
    b, sizes = len(base.ids), base.sizes
    changed = [c for c in cells if c.plan.edits()]
    alone = {c.number for c in changed if _alone(c)}
    size = torch.finfo(wide(base.model.dtype)).bits // 8
    lowest = min((c.stage for c in changed), default=base.depth)
    kept = size * base.ids.numel() * base.model.config.d_model * (base.depth - lowest + 1)
    order = sorted(changed, key=lambda c: (c.number in alone, int(c.start.sum()), c.start.tolist(), c.stage))
    group: list[Cell] = []
    starts: set[tuple[int, ...]] = set()
    longest = 0
    for cell in order:
        start = (0,) * b if cell.number in alone else tuple(cell.start.tolist())
        mine = int((sizes - torch.tensor(start)).max())
        if kept + need(base, b, mine, 1) > memory:
            least = kept + max(need(base, b, int((sizes - c.start).max()), 1) for c in changed)
            raise InputError(
                f"memory={memory} bytes is too little for one cell of this sweep, which takes {least}: give "
                f"memory={least} or more, or fewer rows at a time."
            )
        rows, m, columns = b * (len(group) + 1), max(longest, mine), len(starts | {start})
        fits = kept + need(base, rows, m, columns) <= memory
        even = rows * m <= TOKENS and min(mine, longest) >= EVEN * m
        if group and (not fits or not even or cell.number in alone):
            yield group
            group, starts, longest = [], set(), 0
        group.append(cell)
        starts.add(start)
        longest = max(longest, mine)
    if group:
        yield group


def run_group(
    base: Base, group: Sequence[Cell], edits: Sequence[Sequence[Edit]], lengths: Lengths
) -> Iterator[tuple[int, Tensor]]:
    """(number, logits) of each cell of a group, the logits as a metric takes them."""
    if _alone(group[0]):
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
        columns: dict[tuple[int, ...], int] = {}
        column = [columns.setdefault(tuple(c.start.tolist()), len(columns)) for c in group]
        self.column = torch.tensor(column).to(base.ids.device)
        self.before = [base.before(torch.tensor(start)) for start in columns]
        self.plan = Plan(base.model.config, (), (), self.start, self.start + self.sizes)
        for k, cell in enumerate(group):
            self.plan.beside(cell.plan, k * b)

    def run(self, ops: Ops) -> Tensor:
        """The residual stream (rows, m, d) after the last layer."""
        model, i = self.base.model, self.first
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

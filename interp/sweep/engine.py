"""`sweep`: many runs, each under its own edits, of which nothing is computed twice.

A cell is a list of edits. Before the first layer and the first position that it touches it is the base run, so a cell
is run from there on only: its rows start at that position, from the memory that the base run had there, and enter the
forward at that layer, with the base run's residual stream. Rows of many cells make one padded batch, a group, which
grows from layer to layer as cells enter.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import overload

import torch
from torch import Tensor
from tqdm import tqdm

from minimal_mamba import Edit, Mamba
from minimal_mamba.block import wide
from minimal_mamba.brief import Brief
from minimal_mamba.errors import EditError, InputError
from minimal_mamba.provenance import digest, model_digest

from ..run import Lengths, Metric, apply_metric, each
from .base import Base
from .batch import Cell, alone, begin, run_group, starts
from .store import Saved, edits_digest

TOKENS = 8192  # of a group: enough for the machine to be busy, few enough for the cache
EVEN = 0.7  # the shortest row of a group is at least this much of the longest: the rest is padding
MEMORY = 1 << 30  # bytes


@dataclass(frozen=True, eq=False, repr=False)
class Sweep(Brief):
    """What a sweep gave.

    Args:
        values: (cells, b) the metric of a run under each cell's edits. base: (b,) that of the run without edits.
        backend: the operations that ran. groups: the cells that ran together, by number.
    """

    values: Tensor
    base: Tensor
    backend: str
    groups: tuple[tuple[int, ...], ...]


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
    cells: Iterable[Edit | Iterable[Edit]],
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
            to the same numbers. Metrics and the functions of edits are told from others by their code and what they
            hold, and metrics by what they make of noisy copies of the base run's logits.
    Returns:
        Sweep, or one for each name. Each row of `values` is what `run(model, ids, edits=cell)` would give.
    Raises:
        what `run` raises for any cell, before anything runs; MetricError; InputError for a memory that holds no cell.
    Cost: of each cell the layers behind the one that it touches, from its first position on. In that layer itself only
        the tokens that are touched run, and those that the conv sees them from; of edits inside the scan, the scan
        alone. Later tokens differ by their state alone, which is carried on with the base run's decays. Behind the last
        scan only the last token is made, unless a metric reads others. A cell with a `Mean` of the batch is run alone,
        and whole.
    """
    named = metric if isinstance(metric, Mapping) else {"metric": metric}
    given = list(cells) if isinstance(cells, Iterable) else [cells]  # once: a generator has its cells only once
    if isinstance(cells, Edit) or not all(isinstance(cell, Edit | Iterable) for cell in given):
        raise EditError(f"cells={cells!r:.80}: a list, of each run the edits: one, or several in a list of their own.")
    made = run_cells(model, ids, [each(cell, Edit) for cell in given], named, lengths, backend, memory, progress, path)
    return made if isinstance(metric, Mapping) else made["metric"]


def run_cells(
    model: Mamba, ids: Tensor, todo: Sequence[Sequence[Edit]], named: Mapping[str, Metric], lengths: Lengths,
    backend: str, memory: int, progress: bool, path: str | Path | None,
) -> dict[str, Sweep]:  # fmt: skip
    """`sweep`, of metrics by name."""
    if not isinstance(memory, Real) or isinstance(memory, bool) or memory != memory:
        raise InputError(f"memory={memory!r}: a number of bytes, such as {MEMORY}, a GiB.")
    if not named:
        raise InputError("no metric is given: name at least one, logits (b, l, v) -> (b,).")
    base = Base(model, ids, lengths, backend)
    resolved = [begin(base, number, edits) for number, edits in enumerate(todo)]
    groups = list(_groups(base, resolved, memory))
    base.read(min((c.stage for g in groups for c in g), default=base.depth))
    values = {name: base.logits(fn) for name, fn in named.items()}
    out = {name: v.expand(len(todo), -1).clone() for name, v in values.items()}
    saved = None
    if path is not None:
        what = {
            "model": model_digest(model), "ids": base.ids.tolist(),
            "lengths": None if lengths is None else base.sizes.tolist(),
            "cells": [edits_digest(cell) for cell in todo], "base": {n: digest(v) for n, v in values.items()},
            "metrics": {n: base.known_by(fn) for n, fn in named.items()},
            "backend": base.ops.name, "torch": torch.__version__, "memory": memory,
            "groups": [[c.number for c in group] for group in groups],
        }  # fmt: skip
        saved = Saved(path, what)
    with tqdm(total=len(todo), desc="sweep", disable=not progress) as bar:
        for g, group in enumerate(groups):
            numbers = [cell.number for cell in group]
            done = saved.load(g) if saved else None
            if done is None:
                for cell, logits in run_group(base, group, todo, lengths):
                    for name, fn in named.items():
                        out[name][cell] = apply_metric(fn, logits)
                if saved:
                    saved.save(g, {name: v[numbers] for name, v in out.items()})
            else:
                for name, v in out.items():
                    v[numbers] = done[name].to(v.device)
                if not alone(group[0]):
                    base.before(*starts(base, group))  # in the same steps, so that what follows has the same bits
            bar.update(len(group))
        bar.update(bar.total - bar.n)  # cells without edits
    members = tuple(tuple(c.number for c in group) for group in groups)
    return {name: Sweep(out[name], values[name], base.ops.name, members) for name in named}


def rows_at_once(batch: int | None, most: int, l: int) -> int:
    """The rows that are asked for; if None `most`, or of prompts of many tokens l as few as a group has."""
    if batch is None:
        return min(most, max(1, TOKENS // l))
    if not isinstance(batch, Integral) or isinstance(batch, bool) or batch < 1:
        raise InputError(f"batch={batch!r}: at least 1 row at a time, an int.")
    return int(batch)


def need(base: Base, rows: int, tokens: int, columns: int, stages: int = 1) -> int:
    """Bytes that a group takes at most: its activations, its states, and the base run's where it starts and goes on.

    Args:
        columns: different starts. stages: layers in which its cells begin to differ, each after tokens of its own.
    """
    c, b = base.model.config, len(base.ids)
    size = torch.finfo(wide(base.model.dtype)).bits // 8
    a_token = 3 * c.d_model + 10 * c.d_inner + c.rank + 2 * c.d_state
    states = 4 * rows + (columns * (1 + stages) + 2) * b * base.depth
    return size * (rows * tokens * a_token + states * c.d_inner * (c.d_state + c.d_conv) + rows * c.padded_vocab)


def _groups(base: Base, cells: Sequence[Cell], memory: int) -> Iterator[list[Cell]]:
    """Cells that run together: those that start near one another, as many as the memory holds."""
    b, sizes = len(base.ids), base.sizes
    changed = [c for c in cells if c.plan.edits()]
    apart = {c.number for c in changed if alone(c)}
    size = torch.finfo(wide(base.model.dtype)).bits // 8
    lowest = min((c.stage for c in changed), default=base.depth)
    c = base.model.config
    a_token = c.d_model + 4 * c.d_inner + 2 * c.d_state  # what `Base` keeps of each layer
    kept = size * base.ids.numel() * a_token * (base.depth - lowest + 1)
    order = sorted(changed, key=lambda c: (c.number in apart, int(c.start.sum()), c.start.tolist(), c.stage))
    group: list[Cell] = []
    starts: set[tuple[int, ...]] = set()
    longest = 0
    for cell in order:
        start = (0,) * b if cell.number in apart else tuple(cell.start.tolist())
        mine = int((sizes - torch.tensor(start)).max())
        if kept + need(base, b, mine, 1) > memory:
            least = kept + max(need(base, b, int((sizes - c.start).max()), 1) for c in changed)
            raise InputError(
                f"memory={memory} bytes is too little for one cell of this sweep, which takes {least}: give "
                f"memory={least} or more, or fewer rows at a time."
            )
        rows, m, columns = b * (len(group) + 1), max(longest, mine), len(starts | {start})
        fits = kept + need(base, rows, m, columns, len({c.stage for c in group} | {cell.stage})) <= memory
        even = rows * m <= TOKENS and min(mine, longest) >= EVEN * m
        if group and (not fits or not even or cell.number in apart):
            yield group
            group, starts, longest = [], set(), 0
        group.append(cell)
        starts.add(start)
        longest = max(longest, mine)
    if group:
        yield group

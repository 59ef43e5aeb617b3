"""Linear probes with their controls: what a line reads off a site, and what the same pipeline reads off nothing.

Every number is held out: rows are split by group, and all that is fitted (centre, scales, principal components,
whitening, penalty, weights) is fitted on the training rows of a fold; `interp.probe_fit` has the pipeline. States of a
Mamba point nearly all the same way (cosines near 1), so a probe that does not centre them reads their mean.

Controls, each through the whole pipeline:
    shuffled   the labels permuted over rows (over groups, where each group has one label): chance
    noise      each row replaced by a draw of its own from the Gaussian with the features' mean and covariance: chance
    subspace   the coordinates replaced by their projections on as many random directions as the probe itself uses. Not
               chance: m random directions of k hold m / k of what there is. The probe should be far above it
    random     the same probe on another model's activations, such as one with fresh weights: what the tokens give

Source: Alain & Bengio 2016 (arXiv:1610.01644); controls, Hewitt & Liang 2019 (arXiv:1909.03368); filters against
patterns, Haufe et al. 2014 (NeuroImage 87). The noise is that of the data, all second moments kept and no label.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from kernels_bridge import resolve as operations
from minimal_mamba import Address, Mamba, Plan
from minimal_mamba.address import address_of, named_site, resolve, selector
from minimal_mamba.block import wide
from minimal_mamba.errors import EditError, InputError, nearest
from minimal_mamba.provenance import digest, model_digest
from minimal_mamba.sites import ADDRESSABLE

from .linear_probe import LinearProbe
from .positions import from_start, present
from .probe_fit import How, Space, commonest, decide, fit, interval, like, patterns, score
from .probe_rows import (
    alike,
    labels_at,
    permute,
    read_columns,
    read_features,
    read_groups,
    read_ints,
    read_labels,
    same_so_far,
)
from .run import Lengths, each, known, run
from .sweep.engine import rows_at_once
from .sweep.store import Saved

FOLDS = 5
MEMORY = 1 << 30  # bytes of recordings that a grid takes from one pass, unless one layer's are more


@torch.no_grad()
def collect(
    model: Mamba, ids: Tensor, record: Address | Sequence[Address], *, batch: int = 64, lengths: Lengths = None,
    backend: str = "auto",
) -> dict[Address, Tensor]:  # fmt: skip
    """Record addresses over many rows, a batch at a time; holds what is asked for, and one batch of a forward.

    Returns:
        address -> on the CPU, what one run of all rows would record, NaN in the cells of a slice that a row lacks.
    """
    places = each(record, Address)
    batch = rows_at_once(batch, 64, 1)
    known(model)
    ids, sizes = model.check(ids, lengths)
    every = Plan(model.config, (), places, torch.zeros_like(sizes), sizes)
    axis = {a: int(a.layer_axis) for a in places}  # the batch's
    found: dict[Address, Tensor] = {}
    for i in range(0, len(ids), batch):
        some = slice(i, i + batch)
        size = None if lengths is None else sizes[some]
        out = run(model, ids[some], record=places, lengths=size, backend=backend, last_only=True)
        for a in places:
            piece, has = out.records[a].cpu(), every.present(a)
            lead: tuple[Any, ...] = (slice(None),) * axis[a]
            if a not in found:
                shape = list(piece.shape)
                shape[axis[a]] = len(ids)
                if not isinstance(a.pos, int):
                    shape[axis[a] + 1] = has.shape[1]
                found[a] = torch.full(shape, torch.nan, dtype=piece.dtype)
            part = found[a].narrow(axis[a], i, len(out.ids))
            if isinstance(a.pos, int):
                part.copy_(piece)
            else:  # each row has the same cells of a slice, in the same order, whatever rows stand beside it
                part[(*lead, has[some])] = piece[(*lead, present(model, out, a).cpu())]
    return found


def probe(
    features: Any, labels: Any, *, groups: Any = None, folds: int = FOLDS, dims: int = 64, whiten: bool = True,
    centre: bool = True, shrinkage: float = 1e-3, kind: str = "ridge", seeds: int = 3, seed: int = 0,
    other: Any = None,
) -> LinearProbe:  # fmt: skip
    """Fit a linear probe and its controls, cross-validated.

    Args:
        features: (rows, *features), as recorded, or an array. labels: (rows,) classes (ints, bools or strings) or
            numbers (floats).
        groups: (rows,) what rows share, such as the prompt; a group is never on both sides of a fold. None: rows that
            are the same to the bit are one group, since to have seen one is to know the other; the rest are apart.
            Rows that are no copies and take few values, as a count does, want groups=range(rows).
        dims: at most so many principal components; fewer where there are fewer rows or features.
        whiten: divide by the components' deviations; else only by one number for all. centre: False shows what fails.
        shrinkage: of the components' variances towards their mean, 0 to 1.
        kind: "ridge" (least squares, of classes on one column each) or "logistic" (scikit-learn's). The penalty is
            chosen by an inner cross-validation of the training rows, by group.
        seeds: of each control; 0 leaves them out. other: (rows, ...) the same rows of another model.
    Returns:
        LinearProbe.
    Raises:
        InputError: what cannot be fitted or split. MissingExtra: logistic without scikit-learn.
    Cost: (1 + seeds) * folds eigendecompositions of size min(rows, features), and folds * (2 + 3 seeds) small fits.
        300 rows of the 24,576 numbers of a state of mamba-130m: 10 s of one core, 0.4 GB.
    """
    folds, dims, seeds, seed = read_ints(folds=folds, dims=dims, seeds=seeds, seed=seed)
    if seeds < 0:
        raise InputError(f"seeds={seeds}: so many of each control; 0 leaves them out.")
    rows = read_features("features", features)
    x, shape = rows.flatten(1), (-1, *rows.shape[1:])
    y, classes = read_labels(labels, len(x))
    group = read_groups(alike(x) if groups is None else groups, len(x))
    how = How(dims, whiten, centre, shrinkage, kind, 0 if classes is None else len(classes))
    rng = torch.Generator().manual_seed(seed)
    n_groups = int(group.max()) + 1
    if folds < 2 or n_groups < folds:
        raise InputError(
            f"folds={folds}: from 2 to the number of groups, {n_groups}. Where `groups` is left out, rows that are "
            "the same are one group; give it to tell them apart."
        )
    fold = (torch.randperm(n_groups, generator=rng) % folds)[group]  # (rows,)

    def spaces(x: Tensor) -> list[Tensor]:
        """(rows, k) all rows, as each fold's training rows have them; made once, and read by each set of labels."""
        return [Space.fit(x[fold != i], how)(x) for i in range(folds)]

    def held_out(y: Tensor, fitted: list[Tensor], turn: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the probe says of each row, and what it would say without features."""
        guess, blind = torch.zeros_like(y), torch.zeros_like(y)
        for i, z in enumerate(fitted):
            train, test = fold != i, fold == i
            if turn is not None:
                z = z @ turn[: z.shape[1]]
            w, b = fit(z[train], y[train], group[train], how)
            guess[test] = decide(z[test] @ w.T + b, how)
            blind[test] = commonest(y[train], how)
        return guess, blind

    fitted = spaces(x)
    guess, blind = held_out(y, fitted)
    whole = Space.fit(x, how)
    w, b = fit(whole(x), y, group, how)
    m = max(1, how.classes - 1)
    controls: dict[str, list[float]] = {"shuffled": [], "subspace": [], "noise": []} if seeds else {}
    for _ in range(seeds):
        mixed = permute(y, group, rng)
        controls["shuffled"].append(score(mixed, *held_out(mixed, fitted), how))
        turn = torch.randn(dims, m, generator=rng, dtype=torch.float64)
        controls["subspace"].append(score(y, *held_out(y, fitted, turn), how))
        controls["noise"].append(score(y, *held_out(y, spaces(like(x, rng))), how))
    if other is not None:
        second = read_features("other", other).flatten(1)
        if len(second) != len(x):
            raise InputError(f"other has {len(second)} rows, features {len(x)}: give the same rows of another model.")
        controls["random"] = [score(y, *held_out(y, spaces(second)), how)]

    weights = w @ whole.basis.T  # (classes or 1, f)
    if how.classes == 2:
        weights, b = weights[1:] - weights[:1], b[1:] - b[:1]
    spread = weights - weights.mean(0) if how.classes > 2 else weights
    basis = torch.linalg.svd(spread, full_matrices=False)[2][:m]
    chance = y.bincount().max().item() / len(y) if how.classes else 0.0
    return LinearProbe(
        score(y, guess, blind, how), interval(y, guess, blind, group, how, rng), chance,
        {name: tuple(found) for name, found in controls.items()}, classes, guess, fold, weights.reshape(shape),
        b - weights @ whole.mean, patterns(x, y, how).reshape(shape), basis.reshape(shape), whole.basis.shape[1],
        len(x), n_groups,
    )  # fmt: skip


OPTIONS = {
    k: p.default for k, p in signature(probe).parameters.items() if k not in ("features", "labels", "groups", "other")
}


@dataclass(frozen=True, eq=False)
class ProbeGrid:
    """Probes of one site: `grid[row, column]` is a `LinearProbe`, `values("score")` (layers, columns).

    Args:
        probes: by layer, then by column. layers: of the rows, (None,) for a site of the whole model.
        positions: of the columns; a tuple where several positions were probed together.
    """

    probes: tuple[tuple[LinearProbe, ...], ...]
    site: str
    layers: tuple[int | None, ...]
    positions: tuple[int | tuple[int, ...], ...]

    def __getitem__(self, cell: tuple[int, int]) -> LinearProbe:
        return self.probes[cell[0]][cell[1]]

    def values(self, what: str = "score") -> Tensor:
        """(layers, columns) of "score", "chance", "low", "high", "groups", or a control's mean over its seeds."""

        def of(p: LinearProbe) -> float:
            if what in ("low", "high"):
                return p.interval[what == "high"]
            if what in p.controls:
                return sum(p.controls[what]) / len(p.controls[what])
            if what not in ("score", "chance", "groups"):
                known = ["score", "chance", "low", "high", "groups", *p.controls]
                raise InputError(f"no values {what!r}.{nearest(what, known)} There are {', '.join(known)}.")
            return float(getattr(p, what))

        return torch.tensor([[of(p) for p in row] for row in self.probes], dtype=torch.float64)


def probe_grid(
    model: Mamba,
    ids: Tensor,
    labels: Any,
    *,
    site: str,
    layers: int | slice | Sequence[int] | None = None,
    positions: int | slice | Sequence[int | Sequence[int]] | None = None,
    groups: Any = None,
    random_model: Mamba | None = None,
    lengths: Lengths = None,
    batch: int = 64,
    backend: str = "auto",
    progress: bool = True,
    path: str | Path | None = None,
    **options: Any,
) -> ProbeGrid:
    """Probe a site at each layer and position.

    Args:
        ids: (b, l). labels: (b,), or (b, l) one a position, aligned with `ids`: floats, NaN where there is none, or
            indices of classes, from 0, -1 where there is none.
        site: any site, or "recurrent_state". layers: the rows, as in `at`; all if None.
        positions: the columns, ints (negative from each row's own end); a tuple in the list is one probe over several
            positions, whose rows share their prompt. All if None, which needs rows of one length.
        groups: (b,) what prompts share; None: in each cell, prompts that are the same up to the position are one group,
            since the model cannot tell them apart there; of fewer groups than folds, each is a fold. So a label of the
            first words is read only as far as it is read off words that no other prompt began with. `groups` of a
            probe, or `values("groups")`, says how many.
        random_model: another model of the same sizes, such as one with fresh weights, for the control "random".
        path: a folder to save each probe in, as soon as it is fitted; a grid that was interrupted goes on from there,
            to the same numbers. What is finished comes back from it without a run.
        options: of `probe`.
    Raises:
        InputError: as `probe`, with the cell that it was in. AddressError, EditError: no such place. CheckpointError:
            the folder holds another grid, by model, tokens, labels, groups, places or options, or is damaged.
    Cost: a probe a cell; (b, positions, features) of as many layers at a time as take 1 GiB, one at least, and for them
        rows / batch forwards. A file of a probe of c classes holds up to 3c - 1 numbers of 8 bytes a feature.
    """
    known(model)
    named_site(site)
    ids, sizes = model.check(ids, lengths)
    columns = read_columns(positions, sizes)
    layered = ADDRESSABLE[site].layered
    if not layered and layers is not None:
        raise EditError(f"layers={layers!r}: {site} is no part of a layer.")
    chosen = selector(slice(None) if layers is None else layers, "layer")
    rows: list[int | None] = [*resolve(chosen, model.config.n_layer, "layer")] if layered else [None]
    wanted = sorted({p for column in columns for p in column})
    given = []  # of each column: labels, which rows have one, their groups
    for column in columns:
        y = torch.cat([labels_at(labels, p, sizes) for p in column])
        has = y >= 0 if not y.is_floating_point() else ~y.isnan()
        where = torch.stack([from_start(p, sizes) for p in column]).where(has.reshape(len(column), -1), -1)
        of = same_so_far(ids, where) if groups is None else groups
        given.append((y[has], has, read_groups(of, len(ids)).repeat(len(column))[has]))
    models = [model] if random_model is None else [model, random_model]
    size = math.prod(model.config.size(axis) for axis in ADDRESSABLE[site].features)
    of_layer = len(models) * len(ids) * len(wanted) * size * torch.finfo(wide(model.dtype)).bits // 8
    together = max(1, MEMORY // of_layer)
    saved = None
    if path is not None:
        what = {
            "model": model_digest(model), "random_model": random_model and model_digest(random_model),
            "ids": ids.tolist(), "lengths": None if lengths is None else sizes.tolist(),
            "labels": digest(*(x for y, has, _ in given for x in (y, has))),
            "groups": digest(*(shared for *_, shared in given)), "site": site, "layers": rows, "positions": columns,
            "options": {k: str(v) for k, v in (OPTIONS | options).items()}, "batch": batch,
            "backend": operations(backend, model.device).name, "torch": torch.__version__,
        }  # fmt: skip
        saved = Saved(path, what, "probe_grid")
    found: list[LinearProbe] = []
    with tqdm(total=len(rows) * len(columns), desc=f"probe {site}", disable=not progress) as bar:
        for i in range(0, len(rows), together):
            places = {(r, p): address_of(site, r, pos=p) for r in rows[i : i + together] for p in wanted}
            kept: list[dict[Address, Tensor]] = []
            for layer, j in product(rows[i : i + together], range(len(columns))):
                column, (y, has, shared) = columns[j], given[j]
                there = saved.load(len(found)) if saved else None
                if there is None:
                    kept = kept or [
                        collect(m, ids, [*places.values()], batch=batch, lengths=lengths, backend=backend)
                        for m in models
                    ]
                    xs = [torch.cat([k[places[layer, p]] for p in column])[has] for k in kept]
                    how = dict(options)
                    if groups is None and 2 <= (beginnings := len(shared.unique())) < how.get("folds", FOLDS):
                        how["folds"] = beginnings
                    try:
                        made = probe(xs[0], y, groups=shared, other=xs[1] if xs[1:] else None, **how)
                    except InputError as error:
                        cell = address_of(site, layer, pos=column if len(column) > 1 else column[0])
                        left = "" if has.all() else " Rows whose label is -1 or NaN are left out."
                        raise InputError(f"{cell}: {error}{left}") from None
                    if saved:
                        saved.save(len(found), made.tensors())
                else:
                    made = LinearProbe.from_tensors(there)
                found.append(made)
                bar.update()
    cells = tuple(tuple(found[i : i + len(columns)]) for i in range(0, len(found), len(columns)))
    names = tuple(c[0] if len(c) == 1 else tuple(c) for c in columns)
    return ProbeGrid(cells, site, tuple(rows), names)

"""Patch sweeps: one exact run under one edit for every cell of a grid of layers and positions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from minimal_mamba import Address, Mamba, Set, at
from minimal_mamba.address import Span, resolve, selector
from minimal_mamba.errors import AddressError, EditError, InputError, nearest
from minimal_mamba.sites import ADDRESSABLE

from .run import Lengths, Metric, apply_metric, run

Layers = int | tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Grid:
    """A sweep's numbers, in the unit of its metric.

    Args:
        values: (layers, positions, b) the metric of the base run under one patch.
        base, donor: (b,) the metric of the two runs without a patch.
        site: the site that was patched.
        layers: of each of the grid's rows, a layer or the layers patched together.
        positions: of each column; a negative one, where the batch's lengths differ, counts from each row's own end.
    """

    values: Tensor
    base: Tensor
    donor: Tensor
    site: str
    layers: tuple[Layers, ...]
    positions: tuple[int, ...]

    def effect(self) -> Tensor:
        """values - base, (layers, positions, b)."""
        return self.values - self.base

    def recovered(self) -> Tensor:
        """(layers, positions): mean(values - base) / mean(donor - base); 0 is the base run, 1 the donor.

        The ratio of means, not the mean of ratios, which a single pair with a small gap would rule.
        """
        return self.effect().mean(-1) / self._gap()

    def recovered_error(self) -> Tensor:
        """(layers, positions): one standard error of `recovered`, over the rows of the batch (delta method)."""
        b = len(self.base)
        if b < 2:
            raise InputError(f"a standard error needs at least 2 rows; this sweep has {b}.")
        residual = self.effect() - self.recovered()[..., None] * (self.donor - self.base)
        return residual.std(-1) / b**0.5 / self._gap().abs()

    def _gap(self) -> Tensor:
        gap = (self.donor - self.base).mean()
        if gap.abs() <= 1e-9 * (self.donor.abs() + self.base.abs()).mean() or not gap.isfinite():
            raise InputError(
                f"the donor's metric does not differ from the base's (mean gap {gap.item():.2g}): "
                "nothing to normalise by."
            )
        return gap


@torch.no_grad()
def patch_grid(
    model: Mamba,
    ids: Tensor,
    donor_ids: Tensor,
    *,
    site: str,
    metric: Metric,
    layers: int | slice | Sequence[int | slice | Sequence[int]] | None = None,
    positions: int | slice | Sequence[int] | None = None,
    lengths: Lengths = None,
    backend: str = "auto",
    progress: bool = True,
) -> Grid:
    """Put a donor run's value of a site into the base run, one layer and position at a time.

    Args:
        ids, donor_ids: (b, l) base and donor prompts, row by row.
        site: any site, or "recurrent_state".
        metric: logits (b, l, v) -> (b,); with `lengths` it is given each row's last token, (b, 1, v).
        layers: the grid's rows, an int, a slice or a list; a tuple of layers in a list is patched at once. All, one by
            one, if None.
        positions: the grid's columns, an int, a slice or a list, as in `at`; all if None. Where `lengths` differ,
            negative ints count from each row's own end, and None and slices mean the positions that every row has,
            0 to min(lengths) - 1.
        lengths: (b,) tokens in each row, the same in base and donor.
    Returns:
        Grid; every cell equals one run under that edit.
    Raises:
        AddressError: a layer or position that some row has not; a slice from the end where `lengths` differ.
    Cost: 2 + layers * positions forwards, and the donor's values at all cells.
    """
    if site not in ADDRESSABLE:
        raise EditError(f"site={site!r} is no site.{nearest(site, ADDRESSABLE)}")
    (ids, sizes), (donor_ids, _) = model.check(ids, lengths), model.check(donor_ids)
    if ids.shape != donor_ids.shape:
        raise InputError(
            f"ids {tuple(ids.shape)} and donor_ids {tuple(donor_ids.shape)} differ in shape; "
            "rows and positions must match."
        )
    where = getattr(at, site)
    groups, columns = _rows(layers, site, model.config.n_layer), _columns(positions, sizes)
    last_only = lengths is not None

    def addresses(group: list[int], pos: int | list[int]) -> list[Address]:
        return [where(layer=layer, pos=pos) for layer in group] if group else [where(pos=pos)]

    used = sorted({layer for group in groups for layer in group})
    # apart, because in a short row one from the start and one from the end may be the same
    halves = [h for h in ([p for p in columns if p >= 0], [p for p in columns if p < 0]) if h]
    keep = [a for half in halves for a in addresses(used, half)]
    donor = run(model, donor_ids, record=keep, lengths=lengths, backend=backend, last_only=last_only)
    base = run(model, ids, lengths=lengths, backend=backend, last_only=last_only)
    values = []
    with tqdm(total=len(groups) * len(columns), desc=f"patch {site}", disable=not progress) as bar:
        for group in groups:
            for pos in columns:
                half = next(h for h in halves if pos in h)
                sources = [donor.records[a][:, half.index(pos)] for a in addresses(group, half)]
                edits = [Set(a, source) for a, source in zip(addresses(group, pos), sources, strict=True)]
                out = run(model, ids, edits=edits, lengths=lengths, backend=backend, last_only=last_only)
                values.append(apply_metric(metric, out.logits))
                bar.update()
    grid = torch.stack(values).unflatten(0, (len(groups), len(columns)))
    names = tuple(group[0] if len(group) == 1 else tuple(group) for group in groups if group)
    return Grid(
        grid, apply_metric(metric, base.logits), apply_metric(metric, donor.logits), site, names or (0,), tuple(columns)
    )


def _rows(layers: object, site: str, n_layer: int) -> list[list[int]]:
    """The layers of each of the grid's rows; one row without layers for a site of the whole model."""
    if not ADDRESSABLE[site].layered:
        if layers is not None:
            raise EditError(f"layers={layers!r}: {site} is no part of a layer.")
        return [[]]
    if not isinstance(layers, Iterable):
        return [[i] for i in resolve(selector(slice(None) if layers is None else layers, "layer"), n_layer, "layer")]
    groups = [resolve(selector(group, "layer"), n_layer, "layer") for group in layers]
    if not groups:
        raise EditError(f"layers={layers!r}: name at least one.")
    return groups


def _columns(positions: object, sizes: Tensor) -> list[int]:
    """The positions to patch, as `at` takes them: from the start, or, where the rows' lengths differ, as they are."""
    chosen = selector(slice(None) if positions is None else positions, "pos")
    shortest = int(sizes.min())
    if bool((sizes == shortest).all()):
        return resolve(chosen, shortest, "pos")
    if isinstance(chosen, Span):
        if min(chosen.start or 0, chosen.stop or 0) < 0:
            raise AddressError(
                f"pos: the rows have lengths {sizes.tolist()}, so the slice {chosen} is another one in each; "
                "name the positions, as in positions=[-2, -1]."
            )
        return resolve(chosen, shortest, "pos")
    named = [chosen] if isinstance(chosen, int) else list(chosen)
    for pos in named:
        resolve(pos, shortest, "pos")  # raises for what the shortest row has not
    return named

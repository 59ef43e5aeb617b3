"""Patch sweeps: one exact run under one edit for every cell of a grid of layers and positions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from minimal_mamba import Address, Mamba, Set, at
from minimal_mamba.address import resolve, selector
from minimal_mamba.errors import EditError, InputError, nearest
from minimal_mamba.sites import ADDRESSABLE

from .run import Lengths, Metric, apply_metric, run

Layers = int | tuple[int, ...]


@dataclass(frozen=True)
class Grid:
    """A sweep's numbers, in the unit of its metric.

    Args:
        values: (layers, positions, b) the metric of the base run under one patch.
        base, donor: (b,) the metric of the two runs without a patch.
        site: the site that was patched. layers: of each row, a layer or the layers patched together; positions: of each
            column.
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
    layers: Sequence[int | Sequence[int]] | None = None,
    positions: Sequence[int] | None = None,
    lengths: Lengths = None,
    backend: str = "auto",
    progress: bool = True,
) -> Grid:
    """Put a donor run's value of a site into the base run, one layer and position at a time.

    Args:
        ids, donor_ids: (b, l) base and donor prompts, row by row.
        site: any site, or "recurrent_state".
        metric: logits (b, l, v) -> (b,); with `lengths` it is given each row's last token, (b, 1, v).
        layers: the grid's rows; a tuple of layers is patched at once. All, one by one, if None.
        positions: the grid's columns; all if None. With `lengths`, name positions that every row has.
        lengths: (b,) tokens in each row, the same in base and donor.
    Returns:
        Grid; every cell equals one run under that edit.
    Cost: 2 + layers * positions forwards, and the donor's values at all cells.
    """
    if site not in ADDRESSABLE:
        raise EditError(f"site={site!r} is no site.{nearest(site, ADDRESSABLE)}")
    if tuple(ids.shape) != tuple(donor_ids.shape):
        raise InputError(
            f"ids {tuple(ids.shape)} and donor_ids {tuple(donor_ids.shape)} differ in shape; "
            "rows and positions must match."
        )
    where = getattr(at, site)
    if layers is not None and (not ADDRESSABLE[site].layered or not len(layers)):
        why = "name at least one" if ADDRESSABLE[site].layered else f"{site} is no part of a layer"
        raise EditError(f"layers={layers!r}: {why}.")
    groups: list[list[int]] = [[]]
    if ADDRESSABLE[site].layered:
        asked = range(model.config.n_layer) if layers is None else layers
        groups = [resolve(selector(g, "layer"), model.config.n_layer, "layer") for g in asked]
    _, sizes = model.check(ids, lengths)
    columns = resolve(selector(slice(None) if positions is None else positions, "pos"), int(sizes.min()), "pos")
    last_only = lengths is not None

    def addresses(group: list[int], pos: int | list[int]) -> list[Address]:
        return [where(layer=layer, pos=pos) for layer in group] if group else [where(pos=pos)]

    used = sorted({layer for group in groups for layer in group})
    keep = addresses(used, columns)
    donor = run(model, donor_ids, record=keep, lengths=lengths, backend=backend, last_only=last_only)
    base = run(model, ids, lengths=lengths, backend=backend, last_only=last_only)
    values = []
    with tqdm(total=len(groups) * len(columns), desc=f"patch {site}", disable=not progress) as bar:
        for group in groups:
            sources = [donor.records[a] for a in addresses(group, columns)]
            for i, pos in enumerate(columns):
                edits = [Set(a, source[:, i]) for a, source in zip(addresses(group, pos), sources, strict=True)]
                out = run(model, ids, edits=edits, lengths=lengths, backend=backend, last_only=last_only)
                values.append(apply_metric(metric, out.logits))
                bar.update()
    grid = torch.stack(values).unflatten(0, (len(groups), len(columns)))
    names = tuple(group[0] if len(group) == 1 else tuple(group) for group in groups if group)
    return Grid(
        grid, apply_metric(metric, base.logits), apply_metric(metric, donor.logits), site, names or (0,), tuple(columns)
    )

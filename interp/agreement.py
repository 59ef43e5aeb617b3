"""How an estimated sweep agrees with the exact one: correlations, and the error that a correlation does not see."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minimal_mamba.errors import InputError, of_type

from .sweep import Grid


@dataclass(frozen=True)
class Agreement:
    """How an estimated sweep agrees with the exact one, each as (value, low, high) of a 95 % bootstrap over examples.

    low and high are NaN where nothing was drawn: of one example, or with draws=0.

    Args:
        pearson, spearman: correlations over cells and examples, -1 to 1.
        error: |estimate - exact| / |exact| in norm, which a correlation does not see; 0 is exact, 1 as bad as zeros.
        count: how many cells of how many examples were compared.
    """

    pearson: tuple[float, float, float]
    spearman: tuple[float, float, float]
    error: tuple[float, float, float]
    count: int


def agreement(estimate: Grid, exact: Grid, *, draws: int = 200, seed: int = 0) -> Agreement:
    """Hold an attribution against the exact sweep, cell by cell and example by example.

    Cells in which nothing can happen, as before the first token that differs, agree by themselves and are left out:
    those of which the estimate is zero and the exact effect is rounding, below 1e-5 of the largest.

    Args:
        estimate, exact: of the same site, layers, positions, prompts and metric.
        draws, seed: of the bootstrap, which draws whole examples.
    Raises:
        InputError: what is no Grid, grids of different cells, or none in which anything happens.
    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, section 13.3 (percentile interval).
    """
    for name, grid in (("estimate", estimate), ("exact", exact)):
        of_type(name, grid, Grid, "that patch_grid or attribution_grid gave")
    cells = [(g.site, g.layers, g.positions, g.parts, tuple(g.values.shape)) for g in (estimate, exact)]
    if cells[0] != cells[1]:
        raise InputError(f"the grids differ: cells {cells[0]} and {cells[1]}.")
    gap = (exact.donor - exact.base).norm() + 1e-3 * exact.base.norm()
    if (estimate.base - exact.base).norm() > 0.1 * gap:  # far more than a backend's rounding
        raise InputError(
            "the two grids' base runs give different metrics, so they are of other prompts or another metric, or base "
            "and donor are exchanged in one of them. Make both from the same ids, donor_ids and metric."
        )
    x, y = (grid.effect().flatten(0, -2).double().cpu() for grid in (estimate, exact))  # (cells, b)
    if not (x.isfinite().all() and y.isfinite().all()):
        raise InputError(
            "the grids hold NaN or infinity: look for where the model's numbers overflow, or the metric's."
        )
    alive = (x != 0) | (y.abs() > 1e-5 * y.abs().max())
    if not alive.any():
        raise InputError("no cell of these grids has an effect: base and donor do not differ.")
    b = x.shape[1]
    rng = torch.Generator().manual_seed(seed)
    found = []
    for i in range(draws + 1 if b > 1 else 1):  # draws of one example are all the same
        rows = torch.arange(b) if i == 0 else torch.randint(0, b, (b,), generator=rng)
        p, q = x[:, rows][alive[:, rows]], y[:, rows][alive[:, rows]]
        found.append(torch.stack([_pearson(p, q), _pearson(_ranks(p), _ranks(q)), (p - q).norm() / q.norm()]))
    drawn = torch.stack(found[1:] or [torch.full_like(found[0], torch.nan)])
    low, high = drawn.nanquantile(torch.tensor([0.025, 0.975]).double(), 0)
    parts = [(v, lo, hi) for v, lo, hi in zip(found[0].tolist(), low.tolist(), high.tolist(), strict=True)]
    return Agreement(parts[0], parts[1], parts[2], int(alive.sum()))


def _pearson(p: Tensor, q: Tensor) -> Tensor:
    p, q = p - p.mean(), q - q.mean()
    return (p * q).sum() / (p.norm() * q.norm())


def _ranks(values: Tensor) -> Tensor:
    """Ranks, ties sharing their mean."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse].to(values.dtype)

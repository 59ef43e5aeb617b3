"""An attribution held against the exact sweep, cell by cell. matplotlib loads when the first one is drawn."""

import math
from typing import TYPE_CHECKING

from ..agreement import agreement
from ..sweep import Grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def agreement_scatter(
    estimate: Grid,
    exact: Grid,
    *,
    ax: "Axes | None" = None,
    label: str | None = None,
    unit: str = "nats",
    colour: str = "#0072B2",
    linear: float = 0.1,
    draws: int = 200,
) -> "Axes":
    """Draw the estimated effect of every cell and example over its exact effect, with the line on which they are equal.

    Args:
        estimate, exact: what `attribution_grid` and `patch_grid` gave of the same cells.
        ax: where to draw, also on what is there already; a new figure of column width (3.4 in) if None.
        label: put before Pearson's r and Spearman's rho, with the interval of 95 %, above the axes.
        unit: of the metric.
        linear: both axes are logarithmic beyond this size, and linear within it.
        draws: of the bootstrap, as in `agreement`.
    Raises:
        InputError: what `agreement` raises.
    Returns:
        The axes; both have the same scale.
    """
    import matplotlib.pyplot as plt

    size = 0.85 * plt.rcParams["font.size"]
    found = agreement(estimate, exact, draws=draws)
    if ax is None:
        _, ax = plt.subplots(figsize=(3.4, 3.2), constrained_layout=True)
    x, y = (grid.effect().detach().cpu().double().flatten().numpy() for grid in (exact, estimate))
    words = [
        f"{name} {value:.2f}" + ("" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]")
        for name, (value, low, high) in (("r", found.pearson), ("ρ", found.spearman))
    ]
    ax.plot(x, y, ls="", marker="o", ms=2, mew=0, alpha=0.5, color=colour, rasterized=True)
    drawn = [*ax.get_xlim(), *ax.get_ylim(), abs(x).max(), abs(y).max()]
    top = max(abs(float(v)) for v in drawn)
    decade = 10.0 ** math.floor(math.log10(top)) if top > linear else top
    ticks = [-decade, -linear, linear, decade] if decade > linear else [-decade, 0, decade]
    for scale, limits, axis in ((ax.set_xscale, ax.set_xlim, ax.xaxis), (ax.set_yscale, ax.set_ylim, ax.yaxis)):
        scale("symlog", linthresh=linear)
        limits(-top, top)
        axis.set_ticks(ticks, [f"{tick:g}".replace("-", "−") for tick in ticks])
    ax.axline((0, 0), (1, 1), color="0.4", lw=0.7, zorder=0)
    ax.set_xlabel(f"exact effect ({unit})")
    ax.set_ylabel(f"attribution ({unit})")
    ax.annotate(
        (f"{label}: " if label else "") + ", ".join(words), (1, 1), (0, 2 + 1.2 * size * len(ax.texts)),
        "axes fraction", "offset points", color=colour, fontsize=size, ha="right", va="bottom",
    )  # fmt: skip
    return ax

"""A grid of probes as curves with their intervals, the chance line and the controls."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from minimal_mamba.errors import InputError, of_type

from ..probes import ProbeGrid
from .layers import FEW, layer_bar, shades

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito
MARKS = "ovD^<>"


def probe_curves(
    grid: ProbeGrid,
    *,
    ax: "Axes | None" = None,
    tokens: Sequence[str] | None = None,
    controls: Mapping[str, str] | None = None,
    title: str | None = None,
    legend: bool = True,
) -> "Axes":
    """Draw held-out scores over positions, one curve a layer with its 95 % interval.

    Up to six layers have a colour and a mark each; more are coloured from the lowest, dark, to the highest.

    Args:
        grid: what `probe_grid` returned. ax: where to draw; a new figure of column width (3.4 in) if None.
        tokens: one label a column. controls: name -> label; each is a grey band from its least to its largest mean over
            layers. The shuffled labels if None and if they were made.
        legend: whether to draw one, above the axes, and of many layers the bar of their colours.
    Raises:
        InputError: what is no ProbeGrid; labels that are not as many as the columns.
    Returns:
        The axes; accuracies go from 0 to 1. The dashed line is a guess that has not looked: the share of the commonest
        class, or of numbers R² = 0, their mean.
    """
    of_type("grid", grid, ProbeGrid, "that probe_grid gave")
    n = len(grid.positions)
    if tokens is not None and len(tokens) != n:
        raise InputError(f"tokens has {len(tokens)} labels for the grid's {n}; give one for each.")
    from .labels import name_axis, new_axes, visible

    names = [str(p) for p in grid.positions] if tokens is None else [visible(token) for token in tokens]
    if ax is None:
        ax = new_axes(2.2 if legend else 1.8, names, upright=tokens is not None, title=bool(title))
    classes = grid[0, 0].classes is not None
    made = grid[0, 0].controls
    shown = ({"shuffled": "shuffled labels"} if "shuffled" in made else {}) if controls is None else controls
    x = range(n)
    # bands and the line of a single position have a width too, or they would not show
    ends, times = ([-0.3, 0.3], 2) if n == 1 else (list(x), 1)
    for i, (name, text) in enumerate(shown.items()):
        found = grid.values(name)
        low, high = found.amin(0).tolist() * times, found.amax(0).tolist() * times
        ax.fill_between(
            ends, low, high, color="0.55", alpha=0.35, lw=0.8, label=text, hatch=("", "////", "....")[i % 3]
        )
    score, lows, highs = (grid.values(what) for what in ("score", "low", "high"))
    count = len(grid.layers)
    few, colours = count <= FEW, COLOURS if count <= FEW else shades(count)
    shift = min(0.06, 0.6 / count)  # so that none comes to stand nearer to another position
    for i, layer in enumerate(grid.layers):
        at_x = [c + shift * (i - (count - 1) / 2) for c in x]
        error = [(score[i] - lows[i]).tolist(), (highs[i] - score[i]).tolist()]
        style = {"color": colours[i], "marker": MARKS[i] if few else "o", "ms": 2.5, "lw": 1.0, "elinewidth": 0.7}
        label = None if layer is None or not few else f"layer {layer}"
        ax.errorbar(at_x, score[i].tolist(), yerr=error, label=label, **style)  # type: ignore[arg-type]
    chance = grid.values("chance").mean(0).tolist() * times
    ax.plot(ends, chance, color="black", lw=0.8, ls="--", label="commonest class" if classes else "mean of the labels")
    ax.set_xlim(-0.5, n - 0.5)
    name_axis(ax.xaxis, names, upright=tokens is not None)
    ax.set_xlabel("position" if tokens is None else "token")
    ax.set_ylabel("held-out accuracy" if classes else "held-out $R^2$")
    if classes:
        ax.set_ylim(0, 1.02)
    pad = None
    if legend:
        if not few:
            layer_bar(ax, [str(layer) for layer in grid.layers], colours)
        entries = len(ax.get_legend_handles_labels()[1])
        columns = min(entries, 3 if few else 2)
        ax.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns, frameon=False, fontsize=6.5, columnspacing=1.2,
            handlelength=1.6, labelspacing=0.3, borderpad=0.2, borderaxespad=0.2,
        )  # fmt: skip
        pad = 6 + 9 * math.ceil(entries / columns)  # above the legend
    if title:
        ax.set_title(title, pad=pad)
    return ax

"""A grid of probes as curves with their intervals, the chance line and the controls."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from minimal_mamba.errors import InputError

from ..probes import ProbeGrid

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

    Args:
        grid: what `probe_grid` returned. ax: where to draw; a new figure of column width (3.4 in) if None.
        tokens: one label a column. controls: name -> label; each is a grey band from its least to its largest mean over
            layers. The shuffled labels if None and if they were made.
        legend: whether to draw one.
    Raises:
        InputError: labels that are not as many as the columns.
    Returns:
        The axes; accuracies go from 0 to 1, the dashed line is the share of the commonest class.
    """
    n = len(grid.positions)
    if tokens is not None and len(tokens) != n:
        raise InputError(f"tokens has {len(tokens)} labels for the grid's {n}; give one for each.")
    import matplotlib.pyplot as plt

    from .labels import name_axis, visible

    if ax is None:
        _, ax = plt.subplots(figsize=(3.4, 2.2), constrained_layout=True)
    classes = grid[0, 0].classes is not None
    made = grid[0, 0].controls
    shown = ({"shuffled": "shuffled labels"} if "shuffled" in made else {}) if controls is None else controls
    x = range(n)
    for i, (name, text) in enumerate(shown.items()):
        found = grid.values(name)
        low, high = found.amin(0).tolist(), found.amax(0).tolist()
        ax.fill_between(x, low, high, color="0.55", alpha=0.35, lw=0, label=text, hatch=("", "////", "....")[i % 3])
    score, lows, highs = (grid.values(what) for what in ("score", "low", "high"))
    shift = 0.06
    for i, layer in enumerate(grid.layers):
        at_x = [c + shift * (i - (len(grid.layers) - 1) / 2) for c in x]
        error = [(score[i] - lows[i]).tolist(), (highs[i] - score[i]).tolist()]
        style = {"color": COLOURS[i % 6], "marker": MARKS[i % 6], "ms": 2.5, "lw": 1.0, "elinewidth": 0.7}
        label = None if layer is None else f"layer {layer}"
        ax.errorbar(at_x, score[i].tolist(), yerr=error, label=label, **style)  # type: ignore[arg-type]
    ax.plot(x, grid.values("chance").mean(0).tolist(), color="black", lw=0.8, ls="--", label="commonest class")
    names = [str(p) for p in grid.positions] if tokens is None else [visible(token) for token in tokens]
    name_axis(ax.xaxis, names, upright=tokens is not None)
    ax.set_xlabel("position" if tokens is None else "token")
    ax.set_ylabel("held-out accuracy" if classes else "held-out $R^2$")
    if classes:
        ax.set_ylim(0, 1.02)
    if title:
        ax.set_title(title)
    if legend:
        ax.legend(frameon=False, fontsize=6)
    return ax

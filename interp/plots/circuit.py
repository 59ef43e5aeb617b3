"""A circuit by position and layer, fit for a column of a paper. matplotlib loads when the first one is drawn."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from minimal_mamba import Address
from minimal_mamba.errors import InputError, of_type

from ..circuits import Circuit
from ..circuits.graph import position

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# where a node stands in the cell of its layer and position, across and up, and what it is called
PLACES = {
    "x": (0.0, 0, "x"), "gate": (0.36, 0, "g"), "u": (0.0, 1, "u"),
    "dt": (-0.36, 2, r"$\Delta$"), "B": (0.0, 2, "B"), "C": (0.36, 2, "C"),
    "decay": (-0.36, 3, r"$\bar{A}$"), "state_write": (0.0, 3, "w"), "skip": (0.36, 4, "D"),
    "ssm_state": (0.0, 4, "h"), "y": (0.0, 5, "y"), "mixer_out": (0.0, 6, "o"),
}  # fmt: skip
NAMES = {
    "embed": "E embed", "x": "x conv input", "gate": "g gate", "u": "u SSM input", "dt": r"$\Delta$ dt", "B": "B",
    "C": "C", "decay": r"$\bar{A}$ decay", "state_write": "w state_write", "skip": "D skip", "ssm_state": "h ssm_state",
    "y": "y read", "mixer_out": "o mixer_out", "logits": "L logits",
}  # fmt: skip
TOWARDS, AWAY, MIXED = "#0072B2", "#D55E00", "0.45"  # the first two of Okabe and Ito's palette
SMALL, TICKS, NAME = 6.5, 7.0, 8.0  # sizes of text, pt
LINE = 1.3  # from one line of text to the next, in sizes


def circuit(
    found: Circuit,
    *,
    ax: "Axes | None" = None,
    tokens: Sequence[str] | None = None,
    title: str | None = None,
    unit: str | None = None,
    legend: bool = True,
) -> "Axes":
    """Draw a circuit: positions to the right, layers upward, width of an edge its effect's size, colour its sign.

    Blue moves rows to the donor, orange away from it; grey where the mean over the rows is under half the mean size.

    Args:
        found: a circuit of at least one edge. Positions and layers without a node are left out.
        ax: where to draw; a new figure if None, 3.4 in wide for up to 8 positions, else of a page's width (6.8 in).
        tokens: of all positions; the label of each that is drawn.
        title, unit: of the figure, and of the metric, for the legend.
        legend: say what widths, colours and letters mean, below these axes; a constrained layout makes room for it.
    Returns:
        The axes. Widths are to scale, from 0 at no effect; an edge too thin to see is drawn 0.4 pt wide.
    Raises:
        InputError: what is no Circuit, an empty circuit, or fewer tokens than positions.
    """
    of_type("found", found, Circuit, "that prune gave")
    if not len(found):
        raise InputError("this circuit has no edges; prune with a larger keep= or a smaller threshold=.")
    columns = sorted({position(node) for node in found.nodes})
    if tokens is not None and len(tokens) <= columns[-1]:
        raise InputError(f"tokens has {len(tokens)} labels; this circuit goes up to position {columns[-1]}.")
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyArrowPatch

    from .labels import WIDE, visible

    levels = _levels(found)
    top = max(levels.values())
    if ax is None:
        height = 0.6 + 0.2 * (top + 1) + (0.6 if legend else 0)
        _, ax = plt.subplots(figsize=(3.4 if len(columns) <= 8 else 6.8, height), constrained_layout=True)
    spots = {node: _spot(node, columns, levels) for node in found.nodes}
    largest = max(found.sizes) or 1.0
    for edge, size, towards in zip(found.edges, found.sizes, found.towards, strict=True):
        (x0, y0), (x1, y1) = spots[edge.sender], spots[edge.receiver]
        # past the nodes between: an arc where a straight line would run through them
        long = abs(y1 - y0) > 1.5 and abs(x1 - x0) < 0.1
        arrow = FancyArrowPatch(
            (x0, y0), (x1, y1), arrowstyle="-|>", mutation_scale=4.5, shrinkA=4.7, shrinkB=4.7, zorder=1,
            connectionstyle=f"arc3,rad={-0.35 if long else 0}", linewidth=max(0.4, 2.2 * size / largest),
            color=_colour(size, towards), alpha=0.85, joinstyle="miter", capstyle="butt",
        )  # fmt: skip
        ax.add_patch(arrow)
    for node, (x, y) in spots.items():
        label = PLACES[node.site][2] if node.site in PLACES else node.site[0].upper()
        ax.plot(x, y, "o", markersize=8.5, markerfacecolor="white", markeredgecolor="0.35", markeredgewidth=0.5)
        ax.text(x, y - 0.03, label, ha="center", va="center", fontsize=SMALL)
    names = [str(t) for t in columns] if tokens is None else [f"{visible(tokens[t])}\n{t}" for t in columns]
    width = TICKS * WIDE * max(len(line) for name in names for line in name.split("\n"))
    upright = width > 72 * ax.bbox.width / ax.figure.dpi / len(columns)
    _frame(ax, levels, names, upright)
    ax.set_xlabel("position" if tokens is None else "token, position", fontsize=NAME)
    if title:
        ax.set_title(title)
    if legend:
        under = width if upright else LINE * TICKS * (1 if tokens is None else 2)
        _legend(ax, found, largest, unit, under + LINE * NAME + 8)
    return ax


def _colour(size: float, towards: float) -> str:
    return MIXED if abs(towards) < size / 2 else TOWARDS if towards > 0 else AWAY


def _levels(found: Circuit) -> dict[tuple[int, int], float]:
    """The height of every row of nodes in use: (layer, height in its cell) -> y. Layers are a gap apart."""
    rows = sorted({_row(node) for node in found.nodes})
    levels: dict[tuple[int, int], float] = {}
    y, before = 0.0, None
    for layer, height in rows:
        y += 0.0 if before is None else 1.0 if before == layer else 1.5
        levels[layer, height], before = y, layer
    return levels


def _row(node: Address) -> tuple[int, int]:
    """Layer and height; embeddings are below the first layer, logits above the last."""
    if node.layer is None:
        return (-1, 0) if node.site == "embed" else (1 << 20, 0)
    assert isinstance(node.layer, int)
    return node.layer, PLACES[node.site][1]


def _spot(node: Address, columns: Sequence[int], levels: dict[tuple[int, int], float]) -> tuple[float, float]:
    across = PLACES[node.site][0] if node.site in PLACES else 0.0
    return columns.index(position(node)) + across, levels[_row(node)]


def _frame(ax: "Axes", levels: dict[tuple[int, int], float], columns: Sequence[str], upright: bool) -> None:
    """Axes, the names of layers and columns, and a band behind each layer."""
    top = max(levels.values())
    ticks, names = [], []
    for layer in sorted({layer for layer, _ in levels}):
        inside = [y for (i, _), y in levels.items() if i == layer]
        ticks.append((min(inside) + max(inside)) / 2)
        names.append("embed" if layer < 0 else "logits" if layer == 1 << 20 else str(layer))
        if names[-1].isdigit():
            ax.axhspan(min(inside) - 0.6, max(inside) + 0.6, color="0.94", zorder=0, linewidth=0)
    ax.set_yticks(ticks, names)
    ax.set_xticks(range(len(columns)), columns)
    ax.set_xlim(-0.6, len(columns) - 0.4)
    ax.set_ylim(-0.8, top + 0.8)
    ax.tick_params(length=0, labelsize=TICKS)
    ax.tick_params(axis="x", rotation=90 if upright else 0)
    ax.set_ylabel("layer", fontsize=NAME)
    for side in ("top", "right", "left", "bottom"):
        ax.spines[side].set_visible(False)


def _legend(ax: "Axes", found: Circuit, largest: float, unit: str | None, below: float) -> None:
    """Widths, colours and letters, those in use only, so many points below the axes."""
    from matplotlib.lines import Line2D
    from matplotlib.transforms import ScaledTranslation

    of = f" {unit}" if unit else ""
    there = {_colour(size, towards) for size, towards in zip(found.sizes, found.towards, strict=True)}
    names = {TOWARDS: "towards donor", AWAY: "away", MIXED: "rows differ"}
    lines = [(Line2D([], [], color=c, linewidth=1.1), name) for c, name in names.items() if c in there]
    lines += [
        (Line2D([], [], color="0.2", linewidth=2.2 * share), f"{largest * share:.2g}{of}") for share in (1.0, 0.5)
    ]
    used = {node.site for node in found.nodes}
    across = 72 * ax.bbox.width / ax.figure.dpi
    key = "; ".join(name.replace(" ", "\u00a0") for site, name in NAMES.items() if site in used)
    handles, labels = zip(*lines, strict=True)
    drawn = ax.legend(
        handles, labels, loc="upper center", ncols=3 if across < 300 else len(lines), fontsize=SMALL, frameon=False,
        handlelength=1.6, handletextpad=0.4, columnspacing=1.0, borderaxespad=0, borderpad=0.2,
        title=textwrap.fill(key, int(across / (0.5 * SMALL))), title_fontsize=SMALL, bbox_to_anchor=(0.5, 0),
        bbox_transform=ax.transAxes + ScaledTranslation(0, -below / 72, ax.figure.dpi_scale_trans),
    )  # fmt: skip
    drawn.get_title().set_multialignment("center")

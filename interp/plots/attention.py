"""Token-to-token maps: hidden attention, and what knockouts of a source do. matplotlib loads when one is drawn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from minimal_mamba.errors import InputError, of_type

from ..attention import Attention
from ..knockout_grid import KnockoutGrid
from .maps import draw_map, largest, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEANING = {
    "mean": "mean weight",
    "mean_abs": "mean |weight|",
    "norm": "size of what is read",
}


def attention_map(
    found: Attention,
    *,
    row: int | None = None,
    ax: "Axes | None" = None,
    tokens: Sequence[str] | None = None,
    title: str | None = None,
    limit: float | None = None,
    colorbar: bool = True,
) -> "Axes":
    """Draw a map reduced over the channels: targets downward, sources to the right, grey where the source is later.

    Args:
        found: what `attention` gave with `reduce=`, or of one channel.
        row: of the batch; the mean over it if None.
        ax: where to draw; a new figure of column width (3.4 in) if None.
        tokens: one label for each position of the sequence.
        limit: the end of the colour scale; the largest size drawn if None. Weights with a sign have a symmetric scale,
            white at 0; sizes one from 0.
    Raises:
        InputError: what is no Attention; several channels; a mean of rows whose positions differ; too few labels; a
            limit not above 0.
    Returns:
        The axes. A colour bar's arrow shows that values go beyond the limit. Weights that are not finite are hatched.
    """
    of_type("found", found, Attention, "that attention gave")
    weights = found.weights
    if weights.dim() == 4:
        if weights.shape[-1] > 1:
            raise InputError(f"a map has one number a pair, here are {weights.shape[-1]} channels; pass reduce= first.")
        weights = weights[..., 0]
    if row is None and any(bool((p != p[0]).any()) for p in (found.targets, found.sources)):
        raise InputError("the rows of this batch have other positions each, so their mean has no axes; choose row=.")
    targets, sources = (p[row or 0].tolist() for p in (found.targets, found.sources))
    _labelled(tokens, max(targets + sources) + 1)
    import matplotlib.pyplot as plt

    from .labels import name_axis, new_axes

    values = numbers(weights.mean(0) if row is None else weights[row])
    later = np.array(sources)[None] > np.array(targets)[:, None]
    signed = found.reduce in (None, "mean")
    top = largest(values, limit)
    across, down, upright = _names(sources, tokens), _names(targets, tokens), tokens is not None
    if ax is None:
        ax = new_axes(2.4, across, upright=upright, title=bool(title))
    colours = plt.get_cmap("RdBu_r" if signed else "viridis").with_extremes(bad="0.9")
    label = MEANING[found.reduce] if found.reduce else "weight"
    earlier = np.ma.masked_array(values, later)
    draw_map(ax, earlier, colours, -top if signed else 0, top, bar=label if colorbar else None)
    name_axis(ax.yaxis, down)
    ax.set_xlabel("source")
    ax.set_ylabel("target")
    name_axis(ax.xaxis, across, upright=upright)
    if title:
        ax.set_title(title)
    return ax


def knockout_map(
    grid: KnockoutGrid,
    *,
    ax: "Axes | None" = None,
    tokens: Sequence[str] | None = None,
    title: str | None = None,
    unit: str | None = None,
    limit: float | None = None,
    colorbar: bool = True,
) -> "Axes":
    """Draw what cutting each source from the target does: windows of layers upward, sources to the right.

    Colour is the mean effect over the batch, on a symmetric scale with white at 0. A dot marks a cell that has colour,
    a twentieth of the scale or more, and whose mean is less than two standard errors from 0; the colour bar says so.

    Args:
        grid: what `knockout_grid` returned.
        tokens: one label for each position up to the last source. unit: of the metric.
        ax, title, limit, colorbar: as in `attention_map`.
    Raises:
        InputError: what is no KnockoutGrid; too few labels; a limit not above 0.
    """
    of_type("grid", grid, KnockoutGrid, "that knockout_grid gave; heatmap draws a Grid")
    _labelled(tokens, max(grid.sources) + 1)
    from .labels import name_axis, new_axes

    values = numbers(grid.effect().mean(-1))
    top = largest(values, limit)
    across, upright = _names(grid.sources, tokens), tokens is not None
    if ax is None:
        ax = new_axes(0.22 * len(grid.layers), across, upright=upright, title=bool(title))
    label = f"effect ({unit})" if unit else "effect"
    dots = {}
    if len(grid.base) > 1:
        dots["under 2 s.e. from 0"] = (abs(values) < 2 * numbers(grid.error())) & (abs(values) >= top / 20)
    draw_map(ax, values, "RdBu_r", -top, top, bar=label if colorbar else None, dots=dots, aspect="auto", origin="lower")
    windows = [str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in grid.layers]
    name_axis(ax.yaxis, windows)
    ax.set_xlabel("source that is cut")
    ax.set_ylabel("layer" if all(len(g) == 1 for g in grid.layers) else "layers")
    name_axis(ax.xaxis, across, upright=upright)
    if title:
        ax.set_title(title)
    return ax


def _labelled(tokens: Sequence[str] | None, count: int) -> None:
    if tokens is not None and len(tokens) < count:
        raise InputError(f"tokens has {len(tokens)} labels for {count} positions; give one for each.")


def _names(positions: Sequence[int], tokens: Sequence[str] | None) -> list[str]:
    from .labels import visible

    return [str(p) if tokens is None else visible(tokens[p]) for p in positions]

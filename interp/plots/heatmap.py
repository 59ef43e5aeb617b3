"""A sweep as a heatmap, fit for a column of a paper. matplotlib loads when the first one is drawn."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from minimal_mamba.errors import InputError, of_type

from ..sweep import Grid
from .maps import draw_map, largest, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def heatmap(
    grid: Grid,
    *,
    ax: "Axes | None" = None,
    tokens: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
    title: str | None = None,
    unit: str | None = None,
    normalise: bool = True,
    limit: float | None = None,
    colorbar: bool = True,
    interval: float | None = None,
) -> "Axes":
    """Draw a sweep: layers upward, positions to the right, colour the mean over the batch.

    Args:
        grid: what `patch_grid` returned.
        ax: where to draw; a new figure of column width (3.4 in) if None.
            A grid with parts has one layer (drawn as parts over positions) or one position (layers over parts).
        tokens: one label for each of the grid's positions. rows: one for each of its layers or groups of layers.
        unit: of the metric; said beside the colour bar when not normalised.
        normalise: draw `recovered()` instead of the mean effect in the metric's unit: 0 is the run that is patched, 1
            the other, whose values are put in; base and donor, or of `grid.noising` the donor run and the base run.
        limit: the colour scale is symmetric, -limit to limit, with white at 0; the largest size drawn if None.
        interval: such as 0.95: a dot marks the cells whose bootstrap interval over the batch holds 0, to a
            thousandth of the colour scale; the colour bar says so.
    Raises:
        InputError: what is no Grid; labels that are not as many as what they name; parts over several layers and
            positions; a limit that is not above 0.
    Returns:
        The axes. The scale is symmetric and its ends are the data's, or `limit`, where a colour bar's arrow shows that
        values go beyond it. Cells that are not finite are hatched, and left out of the scale.
    """
    of_type("grid", grid, Grid, "that patch_grid gave, of several metrics one; lens_map draws a tensor")
    cells, (up, ups), (across, columns) = _axes(grid)
    for what, labels, count in (("tokens", tokens, len(columns)), ("rows", rows, len(ups))):
        if labels is not None and len(labels) != count:
            raise InputError(f"{what} has {len(labels)} labels for the grid's {count}; give one for each.")
    from .labels import name_axis, new_axes, visible

    values = numbers(cells(grid.recovered() if normalise else grid.effect().mean(-1)))
    top = largest(values, limit)
    if tokens is not None:
        columns = tokens if across == "part" else [visible(token) for token in tokens]
        across = "part" if across == "part" else "token"
    upright = across != "position"
    if ax is None:
        ax = new_axes(0.22 * len(ups), columns, upright=upright, title=bool(title))
    label = "moved (0 own run, 1 other)" if normalise else f"effect ({unit})" if unit else "effect"
    dots = {}
    if interval is not None:
        low, high = (numbers(cells(end)) for end in grid.interval(interval, normalise=normalise))
        least = 1e-3 * top  # smaller than any colour shows, such as the rounding of a cell where nothing differs
        dots[f"{100 * interval:g} % interval holds 0"] = (low <= least) & (high >= -least)
    draw_map(ax, values, "RdBu_r", -top, top, bar=label if colorbar else None, dots=dots, aspect="auto", origin="lower")
    name_axis(ax.yaxis, ups if rows is None else rows)
    ax.set_xlabel(across)
    ax.set_ylabel(up)
    name_axis(ax.xaxis, columns, upright=upright)
    if title:
        ax.set_title(title)
    return ax


def _axes(
    grid: Grid,
) -> tuple[Callable[[Tensor], Tensor], tuple[str, Sequence[str]], tuple[str, Sequence[str]]]:
    """What makes (rows, columns) of the grid's cells, and the name and labels of each axis."""
    layers = ("layer", [_layer_name(g) for g in grid.layers])
    positions = ("position", [str(p) for p in grid.positions])
    if grid.parts is None:
        return lambda cells: cells, layers, positions
    parts = ("part", list(grid.parts))
    if len(grid.positions) == 1:
        return lambda cells: cells[:, 0], layers, parts
    if len(grid.layers) == 1:
        return lambda cells: cells[0].T, parts, positions
    raise InputError(
        f"a grid of {len(grid.layers)} layers, {len(grid.positions)} positions and {len(grid.parts)} parts has three "
        "axes: sweep one layer, layers=[i], or one position, positions=[p]."
    )


def _layer_name(group: int | tuple[int, ...]) -> str:
    """A layer's number; of layers patched together a run as 0-3, others as 0+2."""
    if isinstance(group, int):
        return str(group)
    run = group == tuple(range(group[0], group[-1] + 1))
    return f"{group[0]}-{group[-1]}" if run else "+".join(map(str, group))

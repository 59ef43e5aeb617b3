"""A sweep as a heatmap, fit for a column of a paper. matplotlib loads when the first one is drawn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from minimal_mamba.errors import InputError

from ..sweep import Grid

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
) -> "Axes":
    """Draw a sweep: layers upward, positions to the right, colour the mean over the batch.

    Args:
        grid: what `patch_grid` returned.
        ax: where to draw; a new figure of column width (3.4 in) if None.
        tokens: one label for each of the grid's positions. rows: one for each of its layers or groups of layers.
        unit: of the metric; said beside the colour bar when not normalised.
        normalise: draw `recovered()` (0 base, 1 donor) instead of the mean effect in the metric's unit.
        limit: the colour scale is symmetric, -limit to limit, with white at 0; the largest size drawn if None.
    Raises:
        InputError: labels that are not as many as what they name.
    Returns:
        The axes. The scale is symmetric and its ends are the data's, or `limit`, where a colour bar's arrow shows that
        values go beyond it.
    """
    for what, labels, count in (("tokens", tokens, len(grid.positions)), ("rows", rows, len(grid.layers))):
        if labels is not None and len(labels) != count:
            raise InputError(f"{what} has {len(labels)} labels for the grid's {count}; give one for each.")
    import matplotlib.pyplot as plt

    values = (grid.recovered() if normalise else grid.effect().mean(-1)).detach().cpu().double().numpy()
    top = float(abs(values).max()) if limit is None else limit
    if ax is None:
        _, ax = plt.subplots(figsize=(3.4, 0.7 + 0.22 * len(grid.layers)), constrained_layout=True)
    image = ax.imshow(
        values, cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto", origin="lower", interpolation="nearest"
    )
    ax.set_yticks(range(len(grid.layers)), [_layer_name(g) for g in grid.layers] if rows is None else rows)
    columns = [str(p) for p in grid.positions] if tokens is None else tokens
    ax.set_xticks(range(len(columns)), columns, rotation=0 if tokens is None else 90)
    ax.set_xlabel("position" if tokens is None else "token")
    ax.set_ylabel("layer")
    ax.tick_params(length=0)
    if title:
        ax.set_title(title)
    if colorbar:
        beyond = "both" if abs(values).max() > top * (1 + 1e-9) else "neither"
        bar = ax.figure.colorbar(image, ax=ax, extend=beyond)
        bar.set_label("moved (0 base, 1 donor)" if normalise else f"effect ({unit})" if unit else "effect")
    return ax


def _layer_name(group: int | tuple[int, ...]) -> str:
    """A layer's number; of layers patched together a run as 0-3, others as 0+2."""
    if isinstance(group, int):
        return str(group)
    run = group == tuple(range(group[0], group[-1] + 1))
    return f"{group[0]}-{group[-1]}" if run else "+".join(map(str, group))

"""What the lenses see: maps over layers and positions, and bars of what adds up to a logit."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from minimal_mamba.errors import InputError, of_type

from ..lens import DirectLogit, StateLens
from .maps import draw_map, largest, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"  # Okabe & Ito: told apart by the colour-blind too


def lens_map(
    values: Tensor,
    *,
    label: str,
    ax: "Axes | None" = None,
    tokens: Sequence[str] | None = None,
    ends: tuple[float, float] | None = None,
) -> "Axes":
    """Draw a number for each layer and position, such as the mean of `logit_lens` for a token: layers upward.

    Args:
        values: (layers + 1, positions), row i is what enters layer i, the last what leaves the model.
        label: what the colours mean, with the unit.
        ax: where to draw; a new figure of column width (3.4 in) if None.
        tokens: a label for each position. ends: of the colour scale; the data's if None. Numbers that are not finite,
            such as those of positions that a padded row lacks, are hatched.
    Raises:
        InputError: values that are no map, labels that are not as many as the positions, or ends that do not rise.
    """
    of_type("values", values, Tensor, "(layers + 1, positions), such as a mean of what logit_lens gave")
    if ends is not None and not ends[0] < ends[1]:
        raise InputError(f"ends={ends}: the lower end of the colour scale comes first, and the upper is above it.")
    if values.dim() != 2:
        raise InputError(
            f"values has shape {tuple(values.shape)}; a map is (layers + 1, positions): take a mean first."
        )
    from .labels import name_axis, new_axes

    rows, columns = values.shape
    across, upright = _across(tokens, columns)
    if ax is None:
        ax = new_axes(0.22 * rows, across, upright=upright)
    shown = numbers(values)
    finite = shown[np.isfinite(shown)]
    low, high = ((finite.min(), finite.max()) if len(finite) else (0.0, 1.0)) if ends is None else ends
    if ends is None and low == high:
        low, high = low - 0.5, high + 0.5
    draw_map(ax, shown, "cividis", low, high, bar=label, aspect="auto", origin="lower")
    name_axis(ax.yaxis, ["embed", *map(str, range(rows - 1))])
    ax.set_xlabel("token" if upright else "position")
    ax.set_ylabel("after layer")
    name_axis(ax.xaxis, across, upright=upright)
    return ax


def parts_bars(found: DirectLogit, *, ax: "Axes | None" = None, unit: str = "nats") -> "Axes":
    """Draw what each part of the model adds to a logit: the mean over the batch, with one standard error.

    Parts that are 0 in every row are left out.

    Raises:
        InputError: what is no DirectLogit.
    """
    of_type("found", found, DirectLogit, "that direct_logit gave")
    import matplotlib.pyplot as plt

    parts: list[tuple[str, Tensor, str]] = [("embed", found.embed, GREY)]
    for i in range(len(found.read)):
        layer = (("state", found.read, BLUE), ("skip", found.skip, ORANGE), ("bias", found.bias, GREY))
        parts += [(f"{i} {name}", values[i], colour) for name, values, colour in layer]
    parts += [("norm bias", found.norm_bias, GREY), ("rest", found.rest, GREY)]
    tiny = 1e-6 * float(found.logit.abs().max())
    parts = [p for p in parts if float(p[1].abs().max()) > tiny]
    parts.append(("sum", found.logit, "black"))
    if ax is None:
        _, ax = plt.subplots(figsize=(3.4, 0.7 + 0.17 * len(parts)), constrained_layout=True)
    names, values, colours = zip(*parts, strict=True)
    means, errors = zip(*map(_mean, values), strict=True)
    ax.barh(range(len(parts)), means, xerr=errors, color=colours, height=0.7, error_kw={"lw": 0.8})
    ax.axvline(0, color="black", lw=0.6)
    ax.set_yticks(range(len(parts)), names)
    ax.invert_yaxis()
    ax.set_xlabel(f"adds to the {found.what} ({unit})")
    ax.set_ylabel("layer and part")
    return ax


def state_map(
    lens: StateLens, *, layer: int | None = None, ax: "Axes | None" = None, tokens: Sequence[str] | None = None,
    unit: str = "nats",
) -> "Axes":  # fmt: skip
    """Draw what is read from the state by the position that wrote it and by state dimension, the mean over the batch.

    Args:
        lens: of `by=("pos", "n")`. layer: one of the lens's layers; their sum if None.
        tokens: a label for each position.
    Raises:
        InputError: what is no StateLens, a lens by other axes, or a layer that it does not have.
    """
    of_type("lens", lens, StateLens, 'that state_lens gave with by=("pos", "n")')
    if lens.by != ("pos", "n"):
        raise InputError(f'this lens is by {lens.by}; make it with by=("pos", "n").')
    if layer is not None and layer not in lens.layers:
        raise InputError(f"layer={layer}: this lens has the layers {lens.layers}.")
    from .labels import name_axis, new_axes

    chosen = lens.values.sum(0) if layer is None else lens.values[lens.layers.index(layer)]
    shown = numbers(chosen.mean(0).T)  # (n, positions)
    across, upright = _across(tokens, shown.shape[1])
    if ax is None:
        ax = new_axes(0.08 * len(shown), across, upright=upright, title=True)
    top = largest(shown, None)
    draw_map(ax, shown, "RdBu_r", -top, top, bar=f"adds ({unit})", aspect="auto", origin="lower")
    name_axis(ax.yaxis, [str(n) for n in range(len(shown))])
    ax.set_xlabel("token" if upright else "position")
    ax.set_ylabel("state dimension n")
    name_axis(ax.xaxis, across, upright=upright)
    if layer is None and len(lens.layers) == 1:
        layer = lens.layers[0]
    where = "all layers" if layer is None else f"layer {layer}"
    added, logit = shown.sum(), float(lens.logit.mean())
    whole = f"{added:.2f} of {logit:.2f} {unit}" if np.isfinite([added, logit]).all() else "no sum, not all is finite"
    ax.set_title(f"{where}: {whole}", fontsize=9)
    return ax


def _mean(values: Tensor) -> tuple[float, float]:
    """The mean over rows and one standard error, 0 of a single row."""
    values = values.detach().double()
    return float(values.mean()), float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0


def _across(tokens: Sequence[str] | None, count: int) -> tuple[list[str], bool]:
    """The names of positions, and whether they are tokens."""
    from .labels import visible

    if tokens is None:
        return [str(i) for i in range(count)], False
    if len(tokens) != count:
        raise InputError(f"tokens has {len(tokens)} labels for {count} positions; give one for each.")
    return [visible(token) for token in tokens], True

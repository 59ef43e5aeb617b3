"""What all maps share: the ends of a colour scale, cells without a number, the colour bar."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from minimal_mamba.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

Numbers = NDArray[Any]


def numbers(values: "Tensor") -> Numbers:
    """The values in numpy, as float64."""
    found: Numbers = values.detach().cpu().double().numpy()
    return found


def largest(values: Numbers, limit: float | None) -> float:
    """The end of a colour scale around or from 0: the limit if given, else the largest finite size; 1 if all is 0.

    Raises:
        InputError: a limit that is not above 0.
    """
    if limit is None:
        return float(abs(values[np.isfinite(values)]).max(initial=0.0)) or 1.0
    if not 0 < limit < math.inf:
        raise InputError(f"limit={limit}: a colour scale ends above 0. Leave limit out for the largest size drawn.")
    return limit


def draw_map(
    ax: "Axes", values: Numbers, cmap: Any, low: float, high: float, *, bar: str | None,
    dots: Mapping[str, Numbers] | None = None, **more: Any,
) -> None:  # fmt: skip
    """Draw values as an image. Those that are not finite are hatched grey, which no colour of a scale is.

    Args:
        bar: the label of the colour bar, whose arrows show that values go beyond its ends; none if None.
        dots: what a dot means -> the cells that have one. Under the label stands what dots and hatching mean, where
            there are some.
    """
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    image = ax.imshow(values, cmap=cmap, vmin=low, vmax=high, interpolation="nearest", **more)
    notes = []
    for meaning, where in (dots or {}).items():
        y, x = where.nonzero()
        ax.scatter(x, y, s=5, color="0.2", edgecolors="white", linewidths=0.4)  # to be seen on any colour
        notes += [f"dot: {meaning}"] if len(x) else []
    shown = np.ma.compressed(values)  # without the cells that a mask leaves out on purpose
    gaps = np.argwhere(~np.isfinite(np.ma.filled(values, 0.0)))
    if len(gaps):
        begins = np.append(True, (np.diff(gaps[:, 0]) != 0) | (np.diff(gaps[:, 1]) != 1)).nonzero()[0]
        wide = np.diff(np.append(begins, len(gaps)))  # runs along a row: a square each would take seconds
        squares = [Rectangle((x - 0.5, y - 0.5), w, 1) for (y, x), w in zip(gaps[begins], wide, strict=True)]
        hatched = PatchCollection(squares, facecolor="0.8", edgecolor="0.45", hatch="//////", linewidth=0)
        ax.add_collection(hatched, autolim=False)
        notes.append("hatched: not finite")
    if bar is not None:
        slack = 1e-9 * max(abs(low), abs(high))
        finite = shown[np.isfinite(shown)]
        beyond = (finite < low - slack).any(), (finite > high + slack).any()
        extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get(beyond, "neither")
        label = ax.figure.colorbar(image, ax=ax, extend=extend).ax.yaxis.label
        lines = [bar, *notes]
        # as large as is no longer than the bar, if that can be read
        fits = 72 * ax.bbox.height / ax.figure.dpi / (0.55 * max(1, *map(len, lines)))
        label.set(text="\n".join(lines), fontsize=min(label.get_fontsize(), max(6, fits)))

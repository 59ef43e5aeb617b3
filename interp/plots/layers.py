"""How the curves of several layers are told apart: a few each by its look, in a legend; more by a scale of colours."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW = 6  # curves that a legend can name


def shades(count: int) -> list[Any]:
    """A colour for each layer, from dark to light, no lighter than shows on white."""
    import matplotlib

    return [matplotlib.colormaps["viridis"](0.9 * i / max(1, count - 1)) for i in range(count)]


def layer_bar(ax: "Axes", names: Sequence[str], colours: Sequence[Any]) -> None:
    """A bar beside the axes with each layer's colour, as many of them named as there is room for."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    from .labels import name_axis

    steps = ScalarMappable(Normalize(-0.5, len(names) - 0.5), ListedColormap(list(colours)))
    bar = ax.figure.colorbar(steps, ax=ax, label="layer")
    name_axis(bar.ax.yaxis, names)
    bar.ax.yaxis.set_tick_params(length=2)

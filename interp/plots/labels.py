"""Names along an axis: tokens that can be seen, as large and as many as there is room for.

Imports matplotlib at once, so plots import it when they are drawn.
"""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

SMALLEST = 5.5  # pt, of a name
APART = 1.05  # from one line of text to the next, in sizes of its font
WIDE = 0.62  # a character, likewise
LONGEST = 12  # characters of a token
LEAST, MOST = 1.5, 5.0  # inches of height: for a colour bar and its label; of a page


def visible(token: object) -> str:
    r"""A token as text: quoted like '\n' where white space or what has no sign would not show, cut where it is long."""
    shown = str(token)
    shown = shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…"
    if not shown or shown != shown.strip() or not shown.isprintable():
        shown = repr(shown)
    return shown.replace("$", r"\$")  # else matplotlib reads mathematics


def new_axes(height: float, below: Sequence[str] = ("0",), *, upright: bool = False, title: bool = False) -> Axes:
    """Axes in a new figure of column width, 3.4 in.

    Args:
        height: of the axes, in inches, if it is neither too little for a colour bar nor too much for a page.
        below, upright: the names under it, as in `name_axis`, for which there is room. title: whether one is above.
    """
    size = plt.rcParams["font.size"] / 72
    under, above = size * (2.5 + (WIDE * max(map(len, below)) if upright else 1.0)), size * (1.8 if title else 0.0)
    tall = min(max(height, LEAST), MOST) + under + above
    # where the layout will put them: sizes of text are chosen by it before
    expected = {"bottom": under / tall, "top": 1 - above / tall}
    return plt.subplots(figsize=(3.4, tall), gridspec_kw=expected, constrained_layout=True)[1]


class Fitting(FixedLocator):
    """A tick for each name, or for every second, third, ... where neighbours would touch, at the size of the drawing.

    Numbers go in steps of 1, 2, 5, 10, 20, ...
    """

    axis: Any  # matplotlib's annotation allows for stand-ins that have no axes
    locs: Any

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(range(len(names)))
        self.widest = max(map(len, names))
        self.numbers = all(name.lstrip("-").isdigit() for name in names)

    def tick_values(self, vmin: Any, vmax: Any) -> Any:
        """The positions of the ticks; of the limits, the axis's own count."""
        return self.locs[:: self.step()]

    def pitch(self) -> float:
        """Points from one name to the next."""
        ends, axes = self.axis.get_view_interval(), self.axis.axes
        across = axes.bbox.width if self.axis.axis_name == "x" else axes.bbox.height
        return float(72 * across / axes.figure.dpi / max(abs(ends[1] - ends[0]), 1e-9))

    def step(self) -> int:
        """Which names are shown: every first, second, ..."""
        label = self.axis.get_major_ticks(1)[0].label1
        beside = self.axis.axis_name == "x" and label.get_rotation() % 180 == 0
        room = label.get_fontsize() * (WIDE * (self.widest + 1) if beside else APART)
        least = max(1, math.ceil(room / max(self.pitch(), 1e-3)))
        if not self.numbers:
            return least
        decade = 10 ** (len(str(least)) - 1)
        return next(step for step in (decade, 2 * decade, 5 * decade, 10 * decade) if step >= least)


def name_axis(axis: Axis, names: Sequence[str], *, upright: bool = False) -> None:
    """Name the integers along an axis from 0 on, once its limits are set; ticks have marks where names are left out.

    Upright names come last: what stands beside the axes decides how much room they have.

    Args:
        upright: turned by 90 degrees, and no larger than lets all be shown, if that can be read.
    """
    axis.set_ticks(range(len(names)), names)
    fitting = Fitting(names)
    axis.set_major_locator(fitting)
    axis.set_tick_params(rotation=90 if upright else 0)
    figure = axis.axes.figure
    if upright and isinstance(figure, Figure) and len(figure.axes) <= 2:  # a map and its bar; of many it takes long
        figure.draw_without_rendering()
    if not fitting.numbers:
        size = axis.get_major_ticks(1)[0].label1.get_fontsize()
        axis.set_tick_params(labelsize=min(size, max(SMALLEST, 0.9 * fitting.pitch() / APART)))
    axis.set_tick_params(length=2 if fitting.step() > 1 else 0)

"""How near each layer's lens comes to what the model will say."""

from typing import TYPE_CHECKING

from torch import Tensor

from minimal_mamba.errors import of_type

from ..tuned_lens import TunedLens

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Z = 1.96  # standard errors: 95 %
LOOKS = {"tuned lens": ("#0072B2", "o"), "logit lens": ("#D55E00", "s")}


def draw_means(ax: "Axes", rows: Tensor, label: str) -> None:
    """The mean over rows of (layers, rows), of one of the two lenses, with its 95 % interval."""
    (colour, mark), layers, mean = LOOKS[label], range(len(rows)), rows.mean(1)
    ax.plot(layers, mean, color=colour, lw=1.1, marker=mark, ms=3, label=label)
    if rows.shape[1] > 1:
        half = Z * rows.std(1) / rows.shape[1] ** 0.5
        ax.fill_between(layers, mean - half, mean + half, color=colour, alpha=0.25, lw=0, label=f"_{label}")


def lens_curve(found: TunedLens, *, ax: "Axes | None" = None, title: str | None = None, legend: bool = True) -> "Axes":
    """Draw KL(model || lens) on held-out rows by layer, on a logarithmic scale: tuned, plain, and without a look.

    Returns:
        The axes. Shaded are 95 % intervals of the means over rows.
    """
    of_type("found", found, TunedLens, "that tuned_lens made")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    if ax is None:
        _, ax = plt.subplots(figsize=(3.4, 2.6), constrained_layout=True)
    draw_means(ax, found.tuned, "tuned lens")
    draw_means(ax, found.plain, "logit lens")
    ax.axhline(float(found.constant.mean()), color="black", lw=0.8, ls=":", label="mean distribution")
    ax.set_yscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("stream before layer")
    ax.set_ylabel("KL(model || lens) (nats)")
    if title:
        ax.set_title(title)
    if legend:
        ax.legend(fontsize=7, frameon=False)
    return ax

"""A steering curve: what a direction does at each strength, beside random directions of its size."""

from typing import TYPE_CHECKING

from minimal_mamba.errors import of_type

from ..steering import SteeringCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def steering_plot(curve: SteeringCurve, *, label: str, ax: "Axes | None" = None, baseline: bool = True) -> "Axes":
    """Draw a metric against strength: the direction with one standard error over rows, the controls with their spread.

    Args:
        label: the metric and its unit. baseline: mark strength 0.
    Returns:
        The axes, from the least strength to the largest. The band is two standard deviations either side between the
        random directions' means over rows; one direction has none.
    Raises:
        InputError: what is no SteeringCurve.
    """
    of_type("curve", curve, SteeringCurve, "that steering_curve gave")
    import matplotlib.pyplot as plt

    if ax is None:
        _, ax = plt.subplots(figsize=(3.4, 2.3), constrained_layout=True)
    strengths, order = curve.strengths.cpu().sort()
    x = strengths.numpy()
    values = curve.values.detach().cpu().double()[order]
    b = values.shape[1]
    error = (values.std(1) / b**0.5).numpy() if b > 1 else None
    if len(curve.controls):
        means = curve.controls.detach().cpu().double().mean(-1)[:, order]  # (c, s)
        middle, beside = means.mean(0), "1 random direction"
        if len(means) > 1:
            low, high = middle - 2 * means.std(0), middle + 2 * means.std(0)
            ax.fill_between(x, low.numpy(), high.numpy(), color="#999999", alpha=0.3, lw=0)
            beside = f"{len(means)} random directions, ± 2 s.d."
        ax.plot(x, middle.numpy(), color="#666666", ls="--", lw=1, label=beside)
    ax.errorbar(x, values.mean(1).numpy(), yerr=error, color="#0072B2", marker="o", ms=3, lw=1.2, capsize=2,
                label="direction")  # fmt: skip
    if baseline:
        ax.axvline(0, color="black", lw=0.6, ls=":")
    ax.set_xlabel("strength (1: mean difference)")
    ax.set_ylabel(label)
    ax.legend(fontsize=7, frameon=False)
    return ax

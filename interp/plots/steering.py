"""A steering curve: what a direction does at each strength, beside random directions of its size."""

from typing import TYPE_CHECKING

from ..steering import SteeringCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def steering_plot(curve: SteeringCurve, *, label: str, ax: "Axes | None" = None, baseline: bool = True) -> "Axes":
    """Draw a metric against strength: the direction with one standard error over rows, the controls with their spread.

    Args:
        label: the metric and its unit. baseline: mark strength 0.
    Returns:
        The axes. The band is two standard deviations either side between the random directions' means over rows.
    """
    import matplotlib.pyplot as plt

    if ax is None:
        _, ax = plt.subplots(figsize=(3.4, 2.3), constrained_layout=True)
    x = curve.strengths.cpu().numpy()
    values = curve.values.detach().cpu().double()
    b = values.shape[1]
    error = (values.std(1) / b**0.5).numpy() if b > 1 else None
    if len(curve.controls):
        means = curve.controls.detach().cpu().double().mean(-1)  # (c, s)
        middle, spread = means.mean(0), means.std(0) if len(means) > 1 else means.mean(0) * 0
        ax.fill_between(
            x, (middle - 2 * spread).numpy(), (middle + 2 * spread).numpy(), color="#999999", alpha=0.3, lw=0
        )
        ax.plot(x, middle.numpy(), color="#666666", ls="--", lw=1, label=f"{len(means)} random directions, ± 2 s.d.")
    ax.errorbar(x, values.mean(1).numpy(), yerr=error, color="#0072B2", marker="o", ms=3, lw=1.2, capsize=2,
                label="direction")  # fmt: skip
    if baseline:
        ax.axvline(0, color="black", lw=0.6, ls=":")
    ax.set_xlabel("strength (1: mean difference)")
    ax.set_ylabel(label)
    ax.legend(fontsize=7, frameon=False)
    return ax

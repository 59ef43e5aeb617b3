"""In how many dimensions of a memory the running value is."""

from typing import Any

import numpy as np

from ..experiments.results import Read
from .style import BLUE, NAMES, ORANGE, PAGE, PINK, legend_below


def by_dimensions(parts: Read) -> dict[int, list[Read]]:
    """Of each number of dimensions that was searched, what each seed found."""
    found: dict[int, list[Read]] = {}
    for name, one in parts.items():
        found.setdefault(int(name.split()[0]), []).append(one)
    return dict(sorted(found.items()))


def share(one: Read) -> float:
    """The share of pairs that gave the target."""
    return float(one["right"] / one["of"])


def dimensions(new: Any, align_masked: Read, align_state_only: Read) -> None:
    """Held-out interchange accuracy against the dimensions that are swapped, of two models."""
    axes = new(1, 2, figsize=(PAGE, 2.3), sharey=True)
    for ax, parts, name, site in zip(
        axes, (align_masked, align_state_only), ("masked", "state_only"), ("conv_state", "ssm_state"), strict=True
    ):
        found = by_dimensions(parts)
        for label, height, line in (("whole memory swapped", "whole", "-."), ("nothing swapped", "nothing", ":")):
            level = np.mean([share(one["controls"][height][0]) for several in found.values() for one in several])
            ax.axhline(level, color="black", lw=0.8, ls=line, label=label)
        scored = {k: [one["held_out"] for one in several] for k, several in found.items()}
        curve(ax, scored, "found by alignment", BLUE, "o")
        for control, label, colour, mark, aside in (
            ("random", "random dimensions", ORANGE, "^", -0.15),
            ("shuffled", "found for shuffled answers", PINK, "s", 0.15),
        ):
            with_it = {k: [one["controls"][control][0] for one in several] for k, several in found.items()
                       if control in several[0]["controls"]}  # fmt: skip
            curve(ax, with_it, label, colour, mark, aside)
        ax.set(title=f"{name}: {NAMES[site]} of all layers", xlabel="dimensions swapped", ylim=(0, 1.04))
        ax.set_xticks(list(found))
    axes[0].set_ylabel("answers that follow\nthe donor's value, held out")
    legend_below(axes[0], 5)


def curve(ax: Any, found: dict[int, list[Read]], label: str, colour: str, mark: str, aside: float = 0.0) -> None:
    """A point with its 95 % interval for each seed, side by side; the line joins the means."""
    if len(found) > 1:
        ax.plot(list(found), [np.mean([share(one) for one in several]) for several in found.values()], color=colour)
    for k, several in found.items():
        for i, one in enumerate(several):
            y, (low, high) = share(one), one["interval"]
            x = k + aside + 0.12 * (i - (len(several) - 1) / 2)
            ax.errorbar(x, y, yerr=[[y - low], [high - y]], color=colour, marker=mark, ms=2.8, lw=0.7, ls="",
                        label=label if i == 0 and k == min(found) else None)  # fmt: skip

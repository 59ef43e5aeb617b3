"""Alignments of growing dimension: how often a swap hands the value over, beside its controls."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from minimal_mamba.errors import InputError, all_of_type

from ..alignment import Alignment
from ..swaps import Swapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CONTROLS = {  # label, colour, mark, and how far from its k it is drawn, so that intervals do not hide one another
    "random": ("random subspaces", "#E69F00", "^", -0.08),
    "shuffled": ("found for shuffled targets", "#CC79A7", "s", 0.08),
}


def alignment_curve(
    found: Sequence[Alignment], *, ax: "Axes | None" = None, title: str | None = None, legend: bool = True
) -> "Axes":  # fmt: skip
    """Draw interchange accuracy on held-out pairs against k, with its 95 % intervals.

    Args:
        found: alignments of one place, of one k or several; of each k all are drawn, and the line joins their means.
    Returns:
        The axes. Lines across are the means of "whole", the ceiling, and "nothing", the floor; "random" and "shuffled"
        are drawn where they were made.
    Raises:
        InputError: what is no list of alignments, or alignments of several places.
    """
    all_of_type("found", found, Alignment, "that align gave")
    if len(places := {one.place for one in found}) > 1:
        raise InputError(f"found: alignments of one place; these are of {', '.join(map(str, places))}.")
    import matplotlib.pyplot as plt

    if ax is None:
        _, ax = plt.subplots(figsize=(3.4, 3.3 if legend else 2.7), constrained_layout=True)
    for name, label, line in (("whole", "whole site swapped", "-."), ("nothing", "nothing swapped", ":")):
        height = sum(one.controls[name][0].accuracy for one in found) / len(found)
        ax.axhline(height, color="black", lw=0.8, ls=line, label=label)

    def points(many: list[tuple[float, Swapped]], label: str, colour: str, mark: str, line: str) -> None:
        ks = sorted({k for k, _ in many})
        means = [sum(s.accuracy for k, s in many if k == at) / sum(k == at for k, _ in many) for at in ks]
        ax.plot(ks, means, color=colour, lw=1.1, ls=line, marker=mark, ms=3, label=label)
        for k, one in many:
            ax.errorbar(k, one.accuracy, [[one.accuracy - one.interval[0]], [one.interval[1] - one.accuracy]],
                        color=colour, marker=mark, ms=3, mfc="none", elinewidth=0.7)  # fmt: skip

    for name, (label, colour, mark, aside) in CONTROLS.items():
        if many := [(len(one.basis) + aside, s) for one in found for s in one.controls.get(name, ())]:
            points(many, label, colour, mark, "--")
    points([(len(one.basis), one.held_out) for one in found], "found by alignment", "#0072B2", "o", "-")
    ax.set_xticks(sorted({len(one.basis) for one in found}))
    ax.set_ylim(0, 1.04)
    ax.set_xlabel("dimensions swapped, k")
    ax.set_ylabel("interchange accuracy, held out")
    if title:
        ax.set_title(title)
    if legend:
        ax.legend(fontsize=7, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.45, -0.2))
    return ax

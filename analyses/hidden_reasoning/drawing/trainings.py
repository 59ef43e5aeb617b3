"""Accuracy by length, and how it comes about in training."""

from typing import Any

import numpy as np

from ..experiments.accuracy import Score
from ..experiments.curves import DEPTHS, sizes
from ..experiments.results import Read
from .style import BLUE, CHANCE, GREEN, ORANGE, PAGE, PINK, RED, SKY, legend_below


def scores(parts: Read, what: str = "concealed") -> dict[int, Score]:
    """Scores by length."""
    return {int(name.split()[-1]): Score(**part) for name, part in parts.items() if name.startswith(f"{what}, ")}


def score_curve(
    ax: Any, parts: Read, label: str, colour: str, mark: str, what: str = "concealed", line: str = "-"
) -> None:
    """Accuracy by length with 95 % intervals."""
    found = scores(parts, what)
    x, share = list(found), [s.share for s in found.values()]
    ends = [s.interval() for s in found.values()]
    error = [[max(0.0, s - lo) for s, (lo, _) in zip(share, ends, strict=True)],
             [max(0.0, hi - s) for s, (_, hi) in zip(share, ends, strict=True)]]  # fmt: skip
    ax.errorbar(x, share, yerr=error, color=colour, marker=mark, ms=2.8, elinewidth=0.7, ls=line, label=label)


def bound_curves(ax: Any, bounds: Read) -> None:
    """The shortcuts that reach most, and chance."""
    shown = {"multiset": ("which operations, unordered", "-"), "last 4": ("the last 4 operations", "--"),
             "last 4, and multiset before": ("the last 4, and which before", "-."),
             "quotient of size 4": ("product of multipliers", ":")}  # fmt: skip
    for name, (label, line) in shown.items():
        if name in bounds:
            found = {int(n): v for n, v in bounds[name].items()}
            ax.plot(list(found), list(found.values()), color="0.45", ls=line, lw=0.9, label=f"best from {label}")
    ax.axhline(CHANCE, color="black", lw=0.5)


def best_bound(ax: Any, bounds: Read) -> None:
    """The best of all shortcuts at each length, and chance."""
    lengths = sorted(int(n) for n in bounds["length"])
    best = [max(found[str(n)] for found in bounds.values()) for n in lengths]
    ax.plot(lengths, best, color="0.45", lw=0.9, label="best shortcut")
    ax.axhline(CHANCE, color="black", lw=0.5)


def accuracy_axes(ax: Any, title: str, trained: int, longest: int = 16) -> None:
    """Labels that all accuracies share."""
    ax.axvspan(trained + 0.5, longest + 0.5, color="0.93", zorder=0)
    ax.text(trained + 0.6, 1.06, "not trained on", fontsize=5.5, va="center")
    ax.set(xlim=(0.5, longest + 0.5), ylim=(0, 1.1), xlabel="operations", ylabel="right final answers", title=title)
    ax.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])


def accuracy(new: Any, evaluate_masked: Read, evaluate_transformer: Read, evaluate_state_only: Read,
             evaluate_doublethink: Read, shortcuts_masked_arithmetic: Read) -> None:  # fmt: skip
    """Accuracy by length of the models that ship, beside shortcuts."""
    one, other = new(1, 2, figsize=(PAGE, 2.8), sharey=True)
    score_curve(one, evaluate_masked, "Mamba", BLUE, "o")
    score_curve(one, evaluate_masked, "Mamba, values written", SKY, "^", "shown", "--")
    score_curve(one, evaluate_state_only, "Mamba without a conv, to length 7", GREEN, "v")
    score_curve(one, evaluate_transformer, "transformer of the same size", RED, "s")
    score_curve(other, evaluate_doublethink, "Mamba", BLUE, "o")
    for ax, title, trained in ((one, "masked, values not written", 12), (other, "doublethink", 10)):
        bound_curves(ax, shortcuts_masked_arithmetic["bounds"])
        accuracy_axes(ax, title, trained)
    legend_below(one, 3)
    other.set_ylabel("")


LOSSES = {"weighted": ("weighted", BLUE, "-"), "reasoning": ("reasoning, unweighted", ORANGE, "--"),
          "all": ("all tokens", GREEN, ":")}  # fmt: skip


def losses(new: Any, curves_all: Read) -> None:
    """Mean accuracy of the lengths 1 to 6 against steps, by loss and depth, one line a seed."""
    axes = new(1, 2, figsize=(PAGE, 2.1), sharey=True)
    for ax, n_layer in zip(axes, (2, 6), strict=True):
        for name, (label, colour, line) in LOSSES.items():
            runs = [v for k, v in curves_all.items() if k.startswith(f"loss {name}, {n_layer} layers")]
            for i, run in enumerate(runs):
                x, y = [r["step"] for r in run["log"]], [np.mean(r["accuracy"]) for r in run["log"]]
                ax.plot(x, y, color=colour, ls=line, lw=0.9, label=label if i == 0 else None)
        ax.set(title=f"{n_layer} layers", xlabel="step of 64 rows", ylim=(0, 1.02))
    axes[0].set_ylabel("running accuracy, mean of lengths\n1 to 6 (0 where not reached)")
    axes[1].legend(loc="lower right", title="loss")


GROUPS = {("mamba", "arithmetic"): ("Mamba, arithmetic", BLUE, "o", "-"),
          ("mamba", "s5"): ("Mamba, S5", SKY, "^", "--"),
          ("transformer", "arithmetic"): ("transformer, arithmetic", RED, "s", "-")}  # fmt: skip


def depth_curve(ax: Any, curves_all: Read) -> None:
    """The longest length that was solved against layers: the mean over seeds, and each seed."""
    shift = -0.18
    for (architecture, acts), (label, colour, mark, line) in GROUPS.items():
        runs = [v for k, v in curves_all.items() if k.startswith(f"depth {architecture}, {acts}, ")]
        if not runs:
            continue
        x = sorted({r["n_layer"] for r in runs})
        means = [np.mean([r["longest"] for r in runs if r["n_layer"] == n]) for n in x]
        ax.plot([n + shift for n in x], means, color=colour, ls=line, label=label)
        ax.scatter([r["n_layer"] + shift for r in runs], [r["longest"] for r in runs], s=9, marker=mark, color=colour)
        shift += 0.12
    reach = [v for k, v in curves_all.items() if k.startswith("reach ")]
    ax.scatter([r["n_layer"] - 0.18 for r in reach], [r["longest"] for r in reach], s=16, marker="D",
               facecolors="none", edgecolors=BLUE, linewidths=0.9, label="trained to 16, not 12")  # fmt: skip
    ax.set(xlabel="layers", ylabel="longest length solved", xticks=DEPTHS, ylim=(0, 14.6))
    ax.legend(loc="upper left")


def size_curves(ax: Any, curves_all: Read) -> None:
    """The longest length that was solved against parameters, one line a depth that was tried at another width."""
    found = sizes(curves_all)
    depths = sorted({part["n_layer"] for name, part in curves_all.items() if name.startswith("width ")})
    for n, colour, mark in zip(depths, (GREEN, PINK, BLUE), "vs^", strict=False):
        mine = {count / 1e6: longest for (count, layers, _), longest in found.items() if layers == n}
        ax.plot(list(mine), [np.mean(longest) for longest in mine.values()], color=colour)
        for i, (count, longest) in enumerate(mine.items()):
            label = f"{n} layers" if i == 0 else None
            ax.scatter([count] * len(longest), longest, s=11, color=colour, marker=mark, label=label)
    ax.set(xlabel="parameters (millions)", xlim=(0, None))


def depth(new: Any, curves_all: Read) -> None:
    """How long a prompt is solved after 1,500 steps, by depth, and by size."""
    deep, large = new(1, 2, figsize=(PAGE, 2.3), sharey=True)
    depth_curve(deep, curves_all)
    size_curves(large, curves_all)
    large.legend(loc="lower right", title="Mamba, arithmetic")

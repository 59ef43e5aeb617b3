"""Every figure of the study, from its results files alone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .accuracy import Score
from .curves import DEPTHS, SOLVED
from .results import Read, ResultsError, read

BLUE, ORANGE, GREEN, PINK, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"  # Okabe and Ito
STYLE = {"font.size": 7, "axes.titlesize": 7, "axes.spines.top": False, "axes.spines.right": False,
         "legend.frameon": False, "legend.fontsize": 6, "pdf.fonttype": 42, "lines.linewidth": 1.1}  # fmt: skip
COLUMN, PAGE = 3.4, 7.0  # inches
CHANCE = 0.2
NAMES = {
    "ssm_state": "SSM state",
    "conv_state": "conv state",
    "recurrent_state": "both",
    "resid_post": "residual stream",
}


def draw_all(results: Path, out: Path) -> list[Path]:
    """Draw each figure whose results are there, as PNG and PDF; the PNGs.

    Raises:
        ResultsError: no results at all, or of another version.
    """
    import matplotlib

    matplotlib.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    made = []
    for name, (needs, draw) in FIGURES.items():
        paths = {need: results / f"{need}.json" for need in needs}
        if all(path.is_file() for path in paths.values()):
            found = {need: read(path, need.split("-")[0])["parts"] for need, path in paths.items()}
            with figure_file(out / name) as new:
                draw(new, **{need.replace("-", "_"): parts for need, parts in found.items()})
            made.append(out / f"{name}.png")
    if not made:
        raise ResultsError(
            f"{results} has no results to draw; `python -m analyses.hidden_reasoning evaluate`, patch, probe, shortcuts and "
            "curves make them."
        )
    return made


@contextmanager
def figure_file(path: Path) -> Iterator[Callable[..., Any]]:
    """Gives `subplots` in the study's style, and saves what was made with it."""
    import matplotlib.pyplot as plt

    made: list[Any] = []

    def subplots(*args: Any, **more: Any) -> Any:
        fig, axes = plt.subplots(*args, constrained_layout=True, **more)
        made.append(fig)
        return axes

    with plt.rc_context(STYLE):
        yield subplots
        for kind, facts in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
            made[0].savefig(path.with_suffix(f".{kind}"), dpi=300, metadata=facts)
        plt.close(made[0])


# -- accuracy ---------------------------------------------------------------------------------------------------------


def scores(parts: Read) -> dict[int, Score]:
    """Scores by length."""
    return {int(name.split()[1]): Score(**part) for name, part in parts.items()}


def score_curve(ax: Any, parts: Read, label: str, colour: str, mark: str) -> None:
    """Accuracy by length with 95 % intervals."""
    found = scores(parts)
    x, share = list(found), [s.share for s in found.values()]
    ends = [s.interval() for s in found.values()]
    error = [[max(0.0, s - lo) for s, (lo, _) in zip(share, ends, strict=True)],
             [max(0.0, hi - s) for s, (_, hi) in zip(share, ends, strict=True)]]  # fmt: skip
    ax.errorbar(x, share, yerr=error, color=colour, marker=mark, ms=2.8, elinewidth=0.7, label=label)


def bound_curves(ax: Any, bounds: Read) -> None:
    """The shortcuts that reach most, and chance."""
    shown = {"multiset": ("which operations, unordered", "-"), "last 4": ("the last 4 operations", "--"),
             "quotient of size 4": ("product of multipliers", ":")}  # fmt: skip
    for name, (label, line) in shown.items():
        if name in bounds:
            found = {int(n): v for n, v in bounds[name].items()}
            ax.plot(list(found), list(found.values()), color="0.45", ls=line, lw=0.9, label=f"best from {label}")
    ax.axhline(CHANCE, color="black", lw=0.5)


def accuracy_axes(ax: Any, title: str, trained: int, longest: int = 16) -> None:
    """Labels that all accuracies share."""
    ax.axvspan(trained + 0.5, longest + 0.5, color="0.93", zorder=0)
    ax.text(trained + 0.6, 1.06, "not trained on", fontsize=5.5, va="center")
    ax.set(xlim=(0.5, longest + 0.5), ylim=(0, 1.1), xlabel="operations", ylabel="right final answers", title=title)
    ax.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])


def accuracy(new: Any, evaluate_masked: Read, evaluate_transformer: Read, evaluate_doublethink: Read,
             shortcuts_masked_arithmetic: Read) -> None:  # fmt: skip
    """Accuracy by length of the models that ship, beside shortcuts."""
    one, other = new(1, 2, figsize=(PAGE, 2.3), sharey=True)
    score_curve(one, evaluate_masked, "Mamba", BLUE, "o")
    score_curve(one, evaluate_transformer, "transformer of the same size", RED, "s")
    score_curve(other, evaluate_doublethink, "Mamba", BLUE, "o")
    for ax, title, trained in ((one, "masked, values not written", 12), (other, "doublethink", 10)):
        bound_curves(ax, shortcuts_masked_arithmetic["bounds"])
        accuracy_axes(ax, title, trained)
    one.legend(loc="center left", bbox_to_anchor=(0.0, 0.55))
    other.set_ylabel("")


# -- trainings --------------------------------------------------------------------------------------------------------

LOSSES = {"weighted": ("weighted", BLUE), "reasoning": ("reasoning, unweighted", ORANGE), "all": ("all tokens", GREEN)}


def losses(new: Any, curves_all: Read) -> None:
    """Accuracy of the hardest of the lengths 1 to 6 against steps, by loss and depth, one line a seed."""
    axes = new(1, 2, figsize=(PAGE, 2.1), sharey=True)
    for ax, n_layer in zip(axes, (2, 6), strict=True):
        for name, (label, colour) in LOSSES.items():
            runs = [v for k, v in curves_all.items() if k.startswith(f"loss {name}, {n_layer} layers")]
            for i, run in enumerate(runs):
                x, y = [r["step"] for r in run["log"]], [min(r["accuracy"]) for r in run["log"]]
                ax.plot(x, y, color=colour, lw=0.8, label=label if i == 0 else None)
        ax.axhline(SOLVED, color="0.6", lw=0.5, ls="--")
        ax.axhline(CHANCE, color="black", lw=0.5)
        ax.set(title=f"{n_layer} layers", xlabel="step of 64 rows", ylim=(0, 1.02))
    axes[0].set_ylabel("running accuracy,\nworst of lengths 1 to 6")
    axes[0].legend(loc="upper left", title="loss")


GROUPS = {("mamba", "arithmetic"): ("Mamba, arithmetic", BLUE, "o", "-"), ("mamba", "s5"): ("Mamba, S5", SKY, "^", "--"),
          ("transformer", "arithmetic"): ("transformer, arithmetic", RED, "s", "-"),
          ("transformer", "s5"): ("transformer, S5", ORANGE, "v", "--")}  # fmt: skip


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
    ax.set(xlabel="layers", ylabel="longest length solved", xticks=DEPTHS, ylim=(0, 12.6))
    ax.legend(loc="upper left")


def depth(new: Any, curves_all: Read) -> None:
    """How long a prompt is solved after 1,500 steps, by depth."""
    depth_curve(new(figsize=(COLUMN, 2.3)), curves_all)


# -- maps -------------------------------------------------------------------------------------------------------------


def share_map(ax: Any, part: Read, words: Sequence[str], title: str, what: str = "share", limit: float = 1.0) -> Any:
    """Layers upward, words to the right; the row of all layers, if there is one, at the top."""
    values = np.array(part[what])
    names = ["all" if isinstance(row, list) else str(row) for row in part["layers"]]
    kind = (
        {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
        if what == "share"
        else {"cmap": "Greys", "vmin": 0, "vmax": 1}
    )
    image = ax.imshow(values, aspect="auto", origin="lower", interpolation="nearest", **kind)
    if names[-1] == "all":
        ax.axhline(len(names) - 1.5, color="black", lw=0.6)
    step = 1 if len(names) <= 8 else 2
    ticks = [i for i, name in enumerate(names) if name == "all" or i % step == 0]
    ax.set_yticks(ticks, [names[i] for i in ticks])
    ax.set_xticks(range(len(part["positions"])), [words[p] for p in part["positions"]], rotation=90, fontsize=5.5)
    ax.set_title(title)
    ax.tick_params(length=2)
    for side in ("top", "right"):
        ax.spines[side].set_visible(True)
    return image


def patching(new: Any, patch_masked: Read) -> None:
    """Four sites over layers and words."""
    words = patch_masked["value: pairs"]["words"]
    axes = new(2, 2, figsize=(PAGE, 4.2), sharex=True, sharey="row")
    for ax, site in zip(axes.flat, NAMES, strict=True):
        image = share_map(ax, patch_masked[f"value: {site}"], words, NAMES[site] if site != "recurrent_state" else
                          "SSM state and conv state")  # fmt: skip
    for ax in axes[:, 0]:
        ax.set_ylabel("layer")
    for ax in axes[1]:
        ax.set_xlabel("word after which the donor's value is put in")
    axes[0, 0].figure.colorbar(image, ax=axes, label="answer moved (0 base, 1 donor)", shrink=0.6, extend="both")


def control(new: Any, patch_masked: Read) -> None:
    """How many answers flip, for pairs whose values differ and for those whose values agree."""
    words = patch_masked["value: pairs"]["words"]
    axes = new(2, 2, figsize=(PAGE, 3.6), sharex=True, sharey=True)
    for row, (kind, label) in enumerate((("value", "values differ"), ("control", "same value, other operation"))):
        for ax, site in zip(axes[row], ("ssm_state", "recurrent_state"), strict=True):
            name = NAMES[site] if site == "ssm_state" else "SSM state and conv state"
            image = share_map(ax, patch_masked[f"{kind}: {site}"], words, f"{name}; {label}", "flip")
    for ax in axes[:, 0]:
        ax.set_ylabel("layer")
    axes[0, 0].figure.colorbar(image, ax=axes, label="answers that change", shrink=0.6)


ACCOUNTS = {"running value": (BLUE, "o"), "partial sum": (ORANGE, "^"), "done": (RED, "s"), "base": ("0.45", "x")}
SAID = {
    "running value": "running value",
    "partial sum": "partial sum",
    "done": "donor's answer",
    "base": "base's answer",
}


def account_curves(ax: Any, found: Read, site: str, title: str) -> None:
    """How often the answer is what each account foretells, where it stands alone, by step."""
    rows = [r for r in found[site] if r["word"] == "after"]
    x = [r["step"] for r in rows]
    for name, (colour, mark) in ACCOUNTS.items():
        share = [r[name]["alone"] / r[name]["of"] for r in rows]
        error = [[s - r[name]["interval"][0] for s, r in zip(share, rows, strict=True)],
                 [r[name]["interval"][1] - s for s, r in zip(share, rows, strict=True)]]  # fmt: skip
        ax.errorbar(x, share, yerr=np.abs(error), color=colour, marker=mark, ms=2.8, elinewidth=0.7, label=SAID[name])
    ax.set(title=title, xlabel="operations before the hand-over", ylim=(-0.03, 1.05), xticks=x)


def handover(new: Any, patch_masked: Read) -> None:
    """What the answers follow when the memory of another prompt is handed over."""
    axes = new(1, 3, figsize=(PAGE, 1.9), sharey=True)
    titles = ("all of the memory", "SSM states of all layers", "conv states of all layers")
    for ax, site, title in zip(axes, ("recurrent_state", "ssm_state", "conv_state"), titles, strict=True):
        account_curves(ax, patch_masked["handover"], site, title)
    axes[0].set_ylabel("answers as foretold")
    axes[0].legend(loc="center left")


def needed(new: Any, patch_masked: Read) -> None:
    """Right answers when a place has its mean."""
    words = patch_masked["value: pairs"]["words"]
    axes = new(1, 3, figsize=(PAGE, 2.3), sharey=True)
    for ax, site in zip(axes, ("ssm_state", "conv_state", "recurrent_state"), strict=True):
        name = NAMES[site] if site != "recurrent_state" else "SSM state and conv state"
        image = share_map(ax, patch_masked[f"needed: {site}"], words, f"{name} set to its mean", "right")
    axes[0].set_ylabel("layer")
    axes[0].figure.colorbar(image, ax=axes, label="right answers", shrink=0.8)


def sets(new: Any, patch_masked: Read) -> None:
    """The most that a run of neighbouring layers moves the answer, by how many they are."""
    axes = new(1, 2, figsize=(PAGE, 2.1), sharey=True)
    words = patch_masked["value: pairs"]["words"]
    for ax, site in zip(axes, ("ssm_state", "recurrent_state"), strict=True):
        part = patch_masked[f"windows: {site}"]
        share, rows = np.array(part["share"]), [r if isinstance(r, list) else [r] for r in part["layers"]]
        most = max(len(r) for r in rows)
        for column, colour in zip((1, len(part["positions"]) // 2, -1), (BLUE, ORANGE, GREEN), strict=True):
            y = [max(share[i, column] for i, r in enumerate(rows) if len(r) == n) for n in range(1, most + 1)]
            ax.plot(
                range(1, most + 1),
                y,
                color=colour,
                marker="o",
                ms=2.5,
                label=f"after {words[part['positions'][column]]}",
            )
        ax.set(xlabel="neighbouring layers patched together", ylim=(-0.05, 1.05), xticks=range(1, most + 1),
               title=NAMES[site] if site == "ssm_state" else "SSM state and conv state")  # fmt: skip
    axes[0].set_ylabel("answer moved,\nbest such set")
    axes[0].legend(loc="lower right")


FIGURES: dict[str, tuple[tuple[str, ...], Callable[..., None]]] = {
    "accuracy": (("evaluate-masked", "evaluate-transformer", "evaluate-doublethink", "shortcuts-masked-arithmetic"),
                 accuracy),
    "losses": (("curves-all",), losses),
    "depth": (("curves-all",), depth),
    "patching": (("patch-masked",), patching),
    "control": (("patch-masked",), control),
    "handover": (("patch-masked",), handover),
    "needed": (("patch-masked",), needed),
    "sets": (("patch-masked",), sets),
}  # fmt: skip

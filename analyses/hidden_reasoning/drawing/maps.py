"""Maps of layers and words, hand-overs and sets of layers: where the hidden value is, and where it is needed."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..experiments.results import Read
from .style import BLUE, GREEN, NAMES, ORANGE, PAGE, RED, SKY, legend_below

QUIET = ("[_]", "[v]")  # words between the operations, whose columns stand without a label


def share_map(ax: Any, part: Read, words: Sequence[str], title: str, what: str = "share", limit: float = 1.0) -> Any:
    """Layers upward, words to the right; the row of all layers, if there is one, at the top.

    Args:
        what: share, of the way from base to donor; or flip or wrong, shares of answers.
    """
    values = 1 - np.array(part["right"]) if what == "wrong" else np.array(part[what])
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
    shown = [(i, words[p]) for i, p in enumerate(part["positions"]) if words[p] not in QUIET]
    ax.set_xticks([i for i, _ in shown], [word for _, word in shown], rotation=90, fontsize=5.5)
    ax.set_title(title)
    ax.tick_params(length=2)
    for side in ("top", "right"):
        ax.spines[side].set_visible(True)
    return image


def patching(new: Any, patch_masked: Read) -> None:
    """Four sites over layers and words."""
    words = patch_masked["value: pairs"]["words"]
    axes = new(2, 2, figsize=(PAGE, 4.2), sharex=True)
    for ax, site in zip(axes.flat, NAMES, strict=True):
        image = share_map(ax, patch_masked[f"value: {site}"], words, NAMES[site])
    for ax in axes[:, 0]:
        ax.set_ylabel("layer")
    for ax in axes[1]:
        ax.set_xlabel("word after which the donor's value is put in")
    axes[0, 0].figure.colorbar(image, ax=axes, label="answer moved (0 base, 1 donor)", shrink=0.6)


def state_only(new: Any, patch_state_only: Read) -> None:
    """A model without a conv's memory: what its SSM state moves, and what breaks without it."""
    words = patch_state_only["value: pairs"]["words"]
    moved, breaks = new(1, 2, figsize=(PAGE, 2.3), sharey=True)
    image = share_map(moved, patch_state_only["value: ssm_state"], words, "SSM state of the donor put in")
    moved.figure.colorbar(image, ax=moved, label="answer moved (0 base, 1 donor)")
    image = share_map(breaks, patch_state_only["needed: ssm_state"], words, "SSM state set to its mean", "wrong")
    moved.figure.colorbar(image, ax=breaks, label="wrong answers")
    moved.set_ylabel("layer")
    for ax in (moved, breaks):
        ax.set_xlabel("word after which it is put in")


def control(new: Any, patch_masked: Read) -> None:
    """How many answers flip, for pairs whose values differ and for those whose values agree."""
    words = patch_masked["value: pairs"]["words"]
    axes = new(2, 2, figsize=(PAGE, 3.6), sharex=True, sharey=True)
    for row, (kind, label) in enumerate((("value", "values differ"), ("control", "same value, other operation"))):
        for ax, site in zip(axes[row], ("ssm_state", "recurrent_state"), strict=True):
            image = share_map(ax, patch_masked[f"{kind}: {site}"], words, f"{NAMES[site]}; {label}", "flip")
    for ax in axes[:, 0]:
        ax.set_ylabel("layer")
    for ax in axes[1]:
        ax.set_xlabel("word after which the donor's memory is put in")
    axes[0, 0].figure.colorbar(image, ax=axes, label="answers that change", shrink=0.6)


ACCOUNTS = {"running value": (BLUE, "o"), "mean": (SKY, "D"), "partial sum": (ORANGE, "^"), "done": (RED, "s"),
            "base": ("0.45", "x")}  # fmt: skip
SAID = {
    "mean": "a value, of its mean memory",
    "running value": "running value",
    "partial sum": "partial sum",
    "done": "donor's answer",
    "base": "base's answer",
}


def account_curves(ax: Any, found: Read, site: str, title: str) -> None:
    """How often the answer is what each account foretells, where it stands alone, by step; and what follows a mean."""
    rows = [r for r in found[site] if r["word"] == "after"]
    x = np.array([r["step"] for r in rows])
    for i, (name, (colour, mark)) in enumerate(ACCOUNTS.items()):
        right, line = ("right", "--") if name == "mean" else ("alone", "-")
        share = np.array([r[name][right] / r[name]["of"] for r in rows])
        ends = np.array([r[name]["interval"] for r in rows]).T
        ax.errorbar(x + 0.09 * (i - 2), share, yerr=np.abs(ends - share), color=colour, marker=mark, ms=2.8, ls=line,
                    elinewidth=0.7, label=SAID[name])  # fmt: skip
    ax.set(title=title, xlabel="operations before it", ylim=(-0.03, 1.05), xticks=x)


def handover(new: Any, patch_masked: Read) -> None:
    """What the answers follow when a memory of another prompt is handed over, at the same step and at another."""
    axes = new(1, 4, figsize=(PAGE, 2.1), width_ratios=[1, 1, 1, 1.25])
    found = patch_masked["handover"]
    titles = ("conv state put in", "SSM state put in", "both: a spliced text")
    for ax, site, title in zip(axes, ("conv_state", "ssm_state", "recurrent_state"), titles, strict=False):
        account_curves(ax, found, site, title)
        ax.sharey(axes[0])
    axes[0].set_ylabel("answers as foretold")
    legend_below(axes[0], 5)
    shifted_map(axes[3], patch_masked[f"shifted, {found['num_steps']} operations"])


def shifted_map(ax: Any, rows: Sequence[Read]) -> None:
    """The share of answers that follow a value handed over from one step to another."""
    n = max(r["to"] for r in rows)
    share = np.zeros((n, n))
    for r in rows:
        share[r["from"] - 1, r["to"] - 1] = r["right"] / r["of"]
    image = ax.imshow(share, origin="lower", cmap="Greys", vmin=0, vmax=1)
    ax.set(title="both, from another step", xlabel="base's step", ylabel="donor's step")
    ax.set_xticks(range(n), range(1, n + 1))
    ax.set_yticks(range(n), range(1, n + 1))
    ax.figure.colorbar(image, ax=ax, label="donor's value taken up", shrink=0.9)


def needed(new: Any, patch_masked: Read) -> None:
    """Wrong answers when a place has its mean."""
    words = patch_masked["value: pairs"]["words"]
    axes = new(1, 2, figsize=(PAGE, 2.1), sharey=True)
    for ax, site in zip(axes, ("ssm_state", "conv_state"), strict=True):
        image = share_map(ax, patch_masked[f"needed: {site}"], words, f"{NAMES[site]} set to its mean", "wrong")
        ax.set_xlabel("word after which it is set")
    axes[0].set_ylabel("layer")
    axes[0].figure.colorbar(image, ax=axes, label="wrong answers", shrink=0.8)


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
            after = next(w for w in reversed(words[: part["positions"][column] + 1]) if w not in QUIET)
            ax.plot(range(1, most + 1), y, color=colour, marker="o", ms=2.5, label=f"after {after.strip('*')}")
        ax.set(xlabel="neighbouring layers patched together", ylim=(-0.05, 1.05), xticks=range(1, most + 1),
               title=NAMES[site])  # fmt: skip
    axes[0].set_ylabel("answer moved,\nbest such set")
    axes[0].legend(loc="center right")

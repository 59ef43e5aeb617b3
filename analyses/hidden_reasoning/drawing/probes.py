"""What probes read, what goes when it is erased, and whether hidden and overt value share channels."""

from typing import Any

import numpy as np

from ..experiments.accuracy import wilson
from ..experiments.results import Read
from .maps import share_map
from .style import BLUE, GREEN, NAMES, ORANGE, PAGE, PINK, RED, SKY, legend_below

LABELS = {"value": ("running value", BLUE, "o"), "partial": ("partial sum", ORANGE, "^"),
          "answer": ("final answer", RED, "s"), "product": ("product so far", GREEN, "v"),
          "rest": ("product to come", PINK, "D"), "overt": ("overt value", SKY, "^")}  # fmt: skip


def layers_of(parts: Read, site: str) -> list[int]:
    """The layers that were probed."""
    return sorted(int(name.rsplit(" ", 1)[1]) for name in parts if name.startswith(f"{site}, layer"))


def probes(new: Any, probe_masked: Read) -> None:
    """Held-out accuracy of the running value by layer and step; and of each label at its best layer, with controls."""
    axes = new(2, 2, figsize=(PAGE, 4.3), width_ratios=[1, 1.15])
    steps = probe_masked["steps"]
    for row, site in zip(axes, ("resid_post", "ssm_state"), strict=True):
        layers = layers_of(probe_masked, site)
        value = {n: np.array([[np.nan if v is None else v for v in probe_masked[f"{site}, layer {i}"][n]["score"]]
                              for i in layers]) for n in probe_masked[f"{site}, layer {layers[0]}"]}  # fmt: skip
        image = row[0].imshow(value["value"], aspect="auto", origin="lower", cmap="Greys", vmin=0.2, vmax=1)
        row[0].set(title=f"running value in the {NAMES[site]}", ylabel="layer")
        row[0].set_xticks(range(len(steps)), steps)
        row[0].set_yticks(range(0, len(layers), 2), layers[::2])
        row[0].figure.colorbar(image, ax=row[0], label="held-out accuracy")
        best_curves(row[1], probe_masked, site, layers, value)
    for ax in axes[1]:
        ax.set_xlabel("operation whose word is read at")
    legend_below(axes[0, 1], 4)


def best_curves(ax: Any, parts: Read, site: str, layers: list[int], value: dict[str, Any]) -> None:
    """Each label at the layer that reads it best at a step, with its interval; and the best of its own controls."""
    steps = parts["steps"]
    for name in value:
        label, colour, mark = LABELS[name]
        some = [j for j in range(len(steps)) if not np.isnan(value[name][:, j]).all()]
        best = [int(np.nanargmax(value[name][:, j])) for j in some]
        at = [parts[f"{site}, layer {layers[i]}"][name] for i in best]
        y = np.array([a["score"][j] for a, j in zip(at, some, strict=True)])
        ends = [np.array([a[k][j] for a, j in zip(at, some, strict=True)]) for k in ("low", "high")]
        ax.errorbar([steps[j] for j in some], y, yerr=[y - ends[0], ends[1] - y], color=colour, marker=mark,
                    ms=2.8, elinewidth=0.7, label=label)  # fmt: skip
        for control, line in (("shuffled", "--"), ("random", ":")):
            found = np.array([parts[f"{site}, layer {i}"][name][control] for i in layers], dtype=float)[:, some]
            ax.plot([steps[j] for j in some], np.nanmax(found, 0), color=colour, lw=0.7, ls=line)
    ax.plot([], [], color="0.3", lw=0.7, ls="--", label="of each: labels shuffled")
    ax.plot([], [], color="0.3", lw=0.7, ls=":", label="of each: untrained model")
    ax.plot(steps, parts["alone"], color="black", lw=0.7, ls="-.", label="value, from the last word")
    ax.set(title=f"{NAMES[site]}, best layer", ylim=(0, 1.05), xticks=steps, ylabel="held-out accuracy")


def erased(new: Any, probe_masked: Read, probe_doublethink: Read) -> None:
    """Right values when the space between the classes' means is projected out of the residual stream after a layer."""
    axes = new(1, 3, figsize=(PAGE, 2.2), sharey=True)
    panels = ((probe_masked, "value", "masked: running value erased"),
              (probe_doublethink, "value", "doublethink: hidden value erased"),
              (probe_doublethink, "overt", "doublethink: overt value erased"))  # fmt: skip
    for ax, (parts, name, title) in zip(axes, panels, strict=True):
        layers = sorted(int(k.rsplit(" ", 1)[1]) for k in parts if k.startswith(f"erase {name}, layer"))
        found = [parts[f"erase {name}, layer {i}"] for i in layers]
        for what, label, colour, mark in (("answer", "final answer", BLUE, "o"), ("overt", "overt values", SKY, "^")):
            if what in found[0]["space"]:
                y = np.array([f["space"][what] for f in found])
                ends = np.array([wilson(round(s * f["prompts"]), f["prompts"]) for s, f in zip(y, found, strict=True)])
                ax.errorbar(layers, y, yerr=np.abs(ends.T - y), color=colour, marker=mark, ms=2.5, elinewidth=0.7,
                            label=label)  # fmt: skip
                each = np.array([[control[what] for control in f["controls"]] for f in found])
                ax.errorbar(layers, each.mean(1), yerr=np.abs([each.min(1), each.max(1)] - each.mean(1)), color=colour,
                            ls=":", elinewidth=0.7, label=f"{label}, labels shuffled")  # fmt: skip
        ax.axhline(0.2, color="black", lw=0.5)
        ax.set(title=title, xlabel="layer after which it is erased", ylim=(0, 1.05))
    axes[0].set_ylabel("right")
    legend_below(axes[1], 4)


def doublethink(new: Any, patch_doublethink: Read) -> None:
    """Patching hidden-value and overt-value pairs, read at the final answer and at the next overt value."""
    words = patch_doublethink["value: pairs"]["words"]
    axes = new(2, 2, figsize=(PAGE, 3.9), sharey=True)
    sites = ("ssm_state", "conv_state")
    for row, (part, what) in enumerate((("value: {}", "hidden value, read at the answer"),
                                        ("overt, next overt: {}", "overt value, read at the next one"))):  # fmt: skip
        for ax, site in zip(axes[row], sites, strict=True):
            found = patch_doublethink[part.format(site)]
            first = patch_doublethink["value: pairs"]["differ_at"][-1]
            keep = [i for i, p in enumerate(found["positions"]) if p >= first]
            found = found | {"positions": [found["positions"][i] for i in keep],
                             "share": np.array(found["share"])[:, keep]}  # fmt: skip
            image = share_map(ax, found, words, f"{NAMES[site]}: {what}")
    for ax in axes[:, 0]:
        ax.set_ylabel("layer")
    for ax in axes[1]:
        ax.set_xlabel("word after which the donor's memory is put in")
    axes[0, 0].figure.colorbar(image, ax=axes, label="moved (0 base, 1 donor)", shrink=0.6)


def channels(new: Any, patch_doublethink: Read) -> None:
    """Each group of channels of the conv states: how much of the hidden and of the overt value it carries."""
    axes = new(1, 2, figsize=(PAGE, 2.3), sharey=True)
    for ax, words in zip(axes, (1, 2), strict=True):
        part = patch_doublethink[f"channels: conv_state, {words} after"]
        hidden, overt = np.abs(part["hidden"]), np.abs(part["overt"])
        layer = np.repeat(np.arange(len(hidden)), hidden.shape[1])
        points = ax.scatter(overt.flatten(), hidden.flatten(), c=layer, s=8, cmap="viridis", linewidths=0)
        ax.set(xscale="log", yscale="log", title=f"conv state, {words} word{'s' * (words > 1)} after the operation")
        ax.set(xlabel="overt value: |share| of the next overt value")
    axes[0].set_ylabel("hidden value: |share| of the answer")
    axes[0].figure.colorbar(points, ax=axes, label="layer")

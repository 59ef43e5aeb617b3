"""Time scales drawn: how long the parts of each layer's state remember, and how far back its layers look."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minimal_mamba.errors import InputError, all_of_type, of_type

from ..timescales import ReceptiveField
from .layers import FEW, layer_bar, shades

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = ("-", "--", "-.", ":")


def half_life_curves(
    lives: Tensor, *, ax: "Axes | None" = None, length: int | None = None, layers: Sequence[int] | None = None
) -> "Axes":
    """Draw how the half-lives of each layer's (channel, dimension) pairs are distributed, as rising shares.

    Args:
        lives: (layers, e, n) tokens, of `half_lives`. length: the prompts' length, marked where given.
        layers: whose they are, where `lives` is a part of what `half_lives` gave; all from 0 on if None.
    Raises:
        InputError: lives of another shape, layers that are not as many as `lives` has.
    Returns:
        The axes. A curve ends below 1 where pairs never forget; layers of which no pair does are named instead.
    """
    of_type("lives", lives, Tensor, "(layers, e, n) that half_lives gave")
    if lives.dim() != 3 or not len(lives):
        raise InputError(f"lives has shape {tuple(lives.shape)}; it is (layers, e, n), of one layer lives[i : i + 1].")
    if layers is not None and len(layers) != len(lives):
        raise InputError(f"layers={list(layers)}: lives has {len(lives)}; name each.")
    ax = _axes() if ax is None else ax
    names = [str(i) for i in (range(len(lives)) if layers is None else layers)]
    endless = []
    for colour, line, name, values in zip(*_looks(len(lives)), names, lives, strict=True):
        ordered = values.detach().flatten().sort().values.cpu().double()
        share = (torch.arange(len(ordered)) + 1) / len(ordered)
        ends = ordered.isfinite()
        if ends.any():
            ax.step(ordered[ends].numpy(), share[ends].numpy(), where="post", color=colour, ls=line, lw=1.2, label=name)
        else:
            endless.append(name)
    if length is not None:
        ax.axvline(length, color="black", lw=0.6, ls=":")
        ax.annotate("prompt", (length, 0.02), xytext=(2, 0), textcoords="offset points", fontsize=7)
    ax.set_xscale("log")
    ax.set_ylim(0, 1)
    ax.set_xlabel("half-life (tokens)")
    ax.set_ylabel("share of state pairs (e, n)")
    _named(ax, names, "never forgets", endless)
    return ax


def field_curves(fields: Sequence[ReceptiveField], *, ax: "Axes | None" = None) -> "Axes":
    """Draw how much of what each layer reads lies within a distance: the mean over rows, a band of one standard error.

    Args:
        fields: one a layer, of `receptive_field`; "all" is what `gradient_field` gave.
    Returns:
        The axes. Rows in which nothing is read are left out of the mean, and named.
    Raises:
        InputError: what is no list of them.
    """
    all_of_type("fields", fields, ReceptiveField, "that receptive_field or gradient_field gave")
    ax = _axes() if ax is None else ax
    names = ["all" if field.layer is None else str(field.layer) for field in fields]
    nothing = []
    for colour, line, name, field in zip(*_looks(len(fields)), names, fields, strict=True):
        share = field.share.detach().cpu().double()
        read = ~share.isnan().any(1)
        rows = len(share) - int(read.sum())
        if rows:
            nothing.append(f"{name} ({rows} of {len(share)} rows)" if read.any() else name)
        if not read.any():
            continue
        within = share[read].cumsum(1)  # (rows, l)
        mean = within.mean(0)
        error = within.std(0) / len(within) ** 0.5 if len(within) > 1 else torch.zeros_like(mean)
        distance = torch.arange(len(mean)).numpy()
        ax.plot(distance, mean.numpy(), color=colour, ls=line, lw=1.2, label=name)
        ax.fill_between(distance, (mean - error).numpy(), (mean + error).numpy(), color=colour, alpha=0.25, lw=0)
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("distance back (tokens)")
    ax.set_ylabel("share read within it")
    _named(ax, names, "nothing is read", nothing)
    return ax


def _axes() -> "Axes":
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(3.4, 2.3), constrained_layout=True)[1]


def _looks(count: int) -> tuple[list[object], list[str]]:
    """A colour and a line for each of `count` layers."""
    return shades(count), [LINES[i % 4] if count <= FEW else "-" for i in range(count)]


def _named(ax: "Axes", names: Sequence[str], what: str, of: Sequence[str]) -> None:
    """Which curve is whose, and of which layers there is none, or not of all rows."""
    drawn = len(ax.get_legend_handles_labels()[1])
    if len(names) > FEW:
        layer_bar(ax, names, shades(len(names)))
    elif drawn:
        ax.legend(title="layer", fontsize=7, title_fontsize=7, frameon=False)
    if of:
        text = textwrap.fill(f"{what}: layer {', '.join(of)}", 40)
        ax.text(0.97, 0.03, text, ha="right", va="bottom", fontsize=7, transform=ax.transAxes)

"""Time scales drawn: how long the parts of each layer's state remember, and how far back its layers look."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..timescales import ReceptiveField

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def half_life_curves(lives: Tensor, *, ax: "Axes | None" = None, length: int | None = None) -> "Axes":
    """Draw how the half-lives of each layer's (channel, dimension) pairs are distributed, as rising shares.

    Args:
        lives: (layers, e, n) tokens, of `half_lives`. length: the prompts' length, marked where given.
    """
    import matplotlib.pyplot as plt

    if ax is None:
        _, ax = plt.subplots(figsize=(3.4, 2.3), constrained_layout=True)
    for (colour, line), (i, values) in zip(_looks(len(lives)), enumerate(lives), strict=True):
        ordered = values.detach().flatten().sort().values.cpu().double()
        share = (torch.arange(len(ordered)) + 1) / len(ordered)
        ax.step(ordered.numpy(), share.numpy(), where="post", color=colour, ls=line, lw=1.2, label=f"{i}")
    if length is not None:
        ax.axvline(length, color="black", lw=0.6, ls=":")
        ax.annotate("prompt", (length, 0.02), xytext=(2, 0), textcoords="offset points", fontsize=7)
    ax.set_xscale("log")
    ax.set_ylim(0, 1)
    ax.set_xlabel("half-life (tokens)")
    ax.set_ylabel("share of state pairs (e, n)")
    ax.legend(title="layer", fontsize=7, title_fontsize=7, frameon=False, ncols=1 + (len(lives) - 1) // 8)
    return ax


def field_curves(fields: Sequence[ReceptiveField], *, ax: "Axes | None" = None) -> "Axes":
    """Draw how much of what each layer reads lies within a distance: the mean over rows, a band of one standard error.

    Args:
        fields: one a layer, of `receptive_field`.
    """
    import matplotlib.pyplot as plt

    if ax is None:
        _, ax = plt.subplots(figsize=(3.4, 2.3), constrained_layout=True)
    for (colour, line), (i, field) in zip(_looks(len(fields)), enumerate(fields), strict=True):
        within = field.share.detach().cpu().double().cumsum(1)  # (b, l)
        mean = within.mean(0)
        error = within.std(0) / len(within) ** 0.5 if len(within) > 1 else torch.zeros_like(mean)
        distance = torch.arange(len(mean)).numpy()
        ax.plot(distance, mean.numpy(), color=colour, ls=line, lw=1.2, label=f"{i}")
        ax.fill_between(distance, (mean - error).numpy(), (mean + error).numpy(), color=colour, alpha=0.25, lw=0)
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("distance back (tokens)")
    ax.set_ylabel("share read within it")
    ax.legend(title="layer", fontsize=7, title_fontsize=7, frameon=False, ncols=1 + (len(fields) - 1) // 8)
    return ax


def _looks(count: int) -> "list[tuple[object, str]]":
    """A colour and a line for each of `count` layers, from dark to light."""
    import matplotlib

    colours = matplotlib.colormaps["viridis"]
    lines = ("-", "--", "-.", ":")
    return [(colours(0.9 * i / max(1, count - 1)), lines[i % 4]) for i in range(count)]

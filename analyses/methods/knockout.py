"""Knockout: what the answer loses when the last word cannot take in one earlier word, in one layer or in all.

A source is cut from a target through the scan, the conv, the selection (dt, B, C), or altogether. The scan alone is the
usual knockout (Endy et al. 2025, arXiv:2505.24244), and leaks: what the source was lives on in the next tokens, which
took it in by the conv. `all` leaks not a bit; `knockout_leak` measures it for any knockout. Proof, against the matrix
form with zeroed entries and the mixer written out with loops: `tests/interp/test_knockout.py`. Cost: of each
cell the layers of its window, with twice the batch (thrice with the selection), and those above from the target on.

The figure: the shipped model's answer under the knockout of each word, layer by layer and in all layers at once, on one
scale for all routes.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from analyses.hidden_reasoning import MASKED, load_organism, pairs
from analyses.hidden_reasoning.experiments.patching import words
from interp import KnockoutGrid, knockout_grid, knockout_map, logit_diff

from ._save import save

STEPS, PROMPTS = 4, 16
WORDS = words(MASKED, STEPS)
LIMIT = 5.0  # nats; beyond it the colour bar's arrow
ROUTES = ("scan", "conv", "selection", "all")


def grids(routes: Sequence[str] = ROUTES) -> list[KnockoutGrid]:
    """The shipped model's answer without each word, layer by layer and in all, by route."""
    model, _ = load_organism("shallow")
    drawn = pairs(STEPS, PROMPTS, [12, 0])

    def metric(logits: Tensor) -> Tensor:
        return logit_diff(logits, drawn.base_answer, drawn.donor_answer)

    layers = [*range(model.config.n_layer), range(model.config.n_layer)]
    return [
        knockout_grid(model, drawn.base_ids, metric, sources=slice(0, -1), layers=layers, through=route, progress=False)
        for route in routes
    ]


def largest(grid: KnockoutGrid) -> float:
    """The most that a cell changes the answer by, in the mean over the prompts, nats."""
    return float(grid.effect().mean(-1).abs().max())


def figure(folder: Path) -> list[Path]:
    """Draw a map for each route into `knockout.png` and `knockout.pdf`."""
    import matplotlib.pyplot as plt

    made = grids()
    gap = float(made[0].base.mean())
    with plt.rc_context({"font.size": 7, "axes.titlesize": 8, "pdf.fonttype": 42}):
        fig, axes = plt.subplots(len(ROUTES), 1, figsize=(3.4, 4.8), sharex=True, constrained_layout=True)
        for ax, grid in zip(axes, made, strict=True):
            title = f"through {grid.through[0]}: {largest(grid):.1f} nats at most"
            knockout_map(grid, ax=ax, tokens=WORDS, limit=LIMIT, colorbar=False, title=title)
            ax.set_xlabel("")
        bar = fig.colorbar(axes[0].images[0], ax=axes, aspect=40, extend="min")
        bar.set_label(f"change of logit(answer) - logit(foil), nats (uncut: {gap:.1f})\ndot: under 2 s.e. from 0")
        axes[-1].set_xlabel(f"word cut from the last word ({PROMPTS} prompts)")
        return save(fig, folder, "knockout")

"""Relevance: which words, layers and states an answer is made from, by layer-wise relevance propagation.

One forward and one backward share out the metric's own value, so that a layer's words sum to it; a plain gradient is
flat where the answer is certain and sums to nothing. Jafari et al. 2024, MambaLRP (arXiv:2406.07592). Proof:
tests/interp/test_relevance.py: conservation, the equations in numpy, HF's model under the same rules.

The figure holds it against what is lost when a word's place is zeroed, one run a cell, and beside it gradient x input.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analyses.hidden_reasoning import MASKED, Pairs, load_organism, pairs
from analyses.hidden_reasoning.experiments.patching import words
from interp import Grid, agreement_scatter, gradients, heatmap, logit_diff, patch_grid, relevance, run
from minimal_mamba import Mamba
from minimal_mamba.address import address_of

from ._save import save

STEPS, PAIRS = 4, 24
SITES = {"embed": "words", "resid_pre": "residual stream", "ssm_state": "SSM state", "conv_state": "conv state"}
COLOURS = {"relevance": "#D55E00", "gradient x input": "#0072B2"}  # Okabe and Ito


def shares(model: Mamba, found: Pairs, site: str) -> dict[str, Grid]:
    """What each cell of a site has of the answer's logit against another value's, in nats.

    Returns:
        "exact": what is lost when it is set to zero, a run a cell; "relevance"; "gradient x input".
    """
    ids = found.base_ids

    def metric(logits: Tensor) -> Tensor:
        return logit_diff(logits, found.base_answer, found.donor_answer)

    zeroed = patch_grid(model, ids, None, site=site, metric=metric, source="zero", progress=False)
    place = address_of(site)
    with torch.no_grad():
        value = run(model, ids, record=[place])[place]
    slope = gradients(model, ids, metric, place)[place]
    features = tuple(range(-len(place.spec.features), 0))
    said = {
        "relevance": relevance(model, ids, metric, place).summed(place),
        "gradient x input": (slope * value).sum(features),
    }

    def grid(cells: Tensor) -> Grid:
        cells = cells.reshape(-1, *ids.shape).movedim(1, 2)  # (layers, positions, b)
        return replace(zeroed, values=zeroed.base + cells)

    return {"exact": replace(zeroed, values=zeroed.base - zeroed.effect())} | {n: grid(x) for n, x in said.items()}


def figure(folder: Path) -> list[Path]:
    """Draw the three by layer and word in the residual stream, and each cell of four sites against what it costs."""
    import matplotlib.pyplot as plt

    model, _ = load_organism("shallow")
    found = pairs(num_steps=STEPS, n=PAIRS, which_step=1, seed=0)
    with plt.rc_context({"font.size": 6, "axes.titlesize": 7, "axes.spines.top": False, "axes.spines.right": False}):
        made: Any = plt.figure(figsize=(3.4, 5.6), constrained_layout=True)
        above, below = made.subfigures(2, 1, height_ratios=[2.6, 3.0])
        maps, panels = above.subplots(3, 1, sharex=True), below.subplots(2, 2).flatten()
        for panel, (site, name) in zip(panels, SITES.items(), strict=True):
            grids = shares(model, found, site)
            for said, colour in COLOURS.items():
                agreement_scatter(grids[said], grids["exact"], ax=panel, colour=colour)
            panel.set_xlabel("lost when zeroed (nats)" if panel in panels[2:] else "")
            panel.set_ylabel("share (nats)" if panel in panels[::2] else "")
            panel.text(0.97, 0.03, name, ha="right", va="bottom", weight="bold", transform=panel.transAxes)
            if site == "resid_pre":
                for ax, (said, grid) in zip(maps, grids.items(), strict=True):
                    heatmap(grid, ax=ax, tokens=words(MASKED, STEPS), normalise=False, unit="nats", limit=12.0)
                    title = "lost when zeroed" if said == "exact" else said
                    ax.set_title(title, color=COLOURS.get(said, "black"))
                    ax.images[0].colorbar.set_label("nats")
                    ax.set_xlabel("residual stream before the layer, at the word" if ax is maps[-1] else "")
        return save(made, folder, "relevance", palette=True)

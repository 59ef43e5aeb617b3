"""Attribution patching: an estimate of every cell of a patch sweep from one forward and one backward.

It asks what `patch_grid` asks, and answers with the gradient at the base, or with its mean on the line to the donor's
embeddings, times the difference of the two runs. The states' grid costs below twice a forward and a backward
(analyses/benchmarks/attribution.py). Source: Nanda 2023; Hanna et al. 2024 (arXiv:2403.17806). The figure holds both
against the exact sweep. Proof: tests/interp/test_attribution.py.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from analyses.hidden_reasoning import load_organism, pairs
from interp import agreement_scatter, attribution_grid, heatmap, logit_diff, patch_grid

from ._save import save

SITES = {
    "ssm_state": "SSM state",
    "conv_state": "conv state",
    "recurrent_state": "both states",
    "resid_post": "residual stream",
}
STEPS = 8
PLAIN, INTEGRATED = "#0072B2", "#D55E00"  # Okabe and Ito


def figure(folder: Path) -> list[Path]:
    """Draw the exact sweep, the two estimates, and each cell of four sites against its exact effect."""
    import matplotlib.pyplot as plt

    model, _ = load_organism("shallow")
    found = pairs(num_steps=4, n=24, which_step=1, seed=0)

    def metric(logits: Tensor) -> Tensor:
        return logit_diff(logits, found.donor_answer, found.base_answer)

    with plt.rc_context({"font.size": 6, "axes.titlesize": 7, "axes.spines.top": False, "axes.spines.right": False}):
        made: Any = plt.figure(figsize=(3.4, 4.95), constrained_layout=True)
        above, below = made.subfigures(2, 1, height_ratios=[1.2, 2.7])
        maps, panels = above.subplots(1, 3, sharey=True), below.subplots(2, 2).flatten()
        for panel, (site, name) in zip(panels, SITES.items(), strict=True):
            given = (model, found.base_ids, found.donor_ids)
            exact = patch_grid(*given, site=site, metric=metric, progress=False)
            plain = attribution_grid(*given, site=site, metric=metric, progress=False)
            line = attribution_grid(*given, site=site, metric=metric, steps=STEPS, progress=False)
            agreement_scatter(plain, exact, ax=panel, colour=PLAIN)
            agreement_scatter(line, exact, ax=panel, colour=INTEGRATED)
            panel.text(0.97, 0.03, name, ha="right", va="bottom", weight="bold", transform=panel.transAxes)
            if site == "ssm_state":
                titles = {"exact": "black", "at the base": PLAIN, "along embeddings": INTEGRATED}
                for ax, grid, (title, colour) in zip(maps, (exact, plain, line), titles.items(), strict=True):
                    heatmap(grid, ax=ax, limit=1.0, colorbar=ax is maps[-1])
                    ax.set_title(title, color=colour)
                    ax.set_xticks(range(0, len(grid.positions), 4))
                    ax.set_ylabel("SSM state of layer" if ax is maps[0] else "")
        for panel in panels[:2]:
            panel.set_xlabel("")
        for panel in panels[1::2]:
            panel.set_ylabel("")
        return save(made, folder, "attribution", palette=True)

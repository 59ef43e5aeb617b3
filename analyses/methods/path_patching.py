"""Which edges of the model's graph carry a difference between two prompts, exactly and to first order.

`path_patch` lets one edge carry the donor's value, at some rows of a forward each; `edge_attribution` gives the first
order of that for all edges from one forward and one backward (Wang et al. 2022; Syed et al. 2023). The figure compares
them on the model that ships: at the base, and averaged on the way on which all edges go to the donor (`steps=`), which
shares out the whole difference and is no estimate of one edge alone. tests/interp/test_paths.py holds each edge to two
runs made by hand in plain PyTorch.
"""

from pathlib import Path

import torch
from torch import Tensor

from analyses.hidden_reasoning import load_organism, pairs
from interp import edge_attribution, logit_diff, path_patch

from ._save import save

ROWS, STEPS, EACH = 4, 8, 6


def figure(folder: Path) -> list[Path]:
    """Exact effects against the two approximations, for every EACH-th edge by rank of either."""
    import matplotlib.pyplot as plt

    model, _ = load_organism("shallow")
    found = pairs(num_steps=4, n=ROWS, which_step=1, seed=0)
    prompts = (model, found.base_ids, found.donor_ids)

    def metric(logits: Tensor) -> Tensor:
        return logit_diff(logits, found.donor_answer, found.base_answer)

    ways = {
        "at the base": edge_attribution(*prompts, metric),
        f"{STEPS} points on the way": edge_attribution(*prompts, metric, steps=STEPS),
    }
    first = next(iter(ways.values()))
    ranks = [way.size().argsort(descending=True)[:600:EACH].tolist() for way in ways.values()]
    chosen = sorted({i for rank in ranks for i in rank})
    exact = path_patch(
        *prompts, [e for i in chosen if not isinstance(e := first.edges[i], tuple)], metric, progress=False
    )
    drawn, axes = plt.subplots(1, 2, figsize=(3.4, 1.95), sharey=True, constrained_layout=True)
    x = exact.values.flatten()
    for ax, (name, way) in zip(axes, ways.items(), strict=True):
        y = way.values[chosen].flatten()
        both = torch.stack([x, y])
        r, top = float(torch.corrcoef(both)[0, 1]), float(both.abs().max())
        ax.plot([-top, top], [-top, top], color="0.7", linewidth=0.6, zorder=0)
        ax.plot(x, y, "o", markersize=1.6, markeredgewidth=0, color="#0072B2", alpha=0.6)
        ax.set_xscale("symlog", linthresh=0.1)
        ax.set_yscale("symlog", linthresh=0.1)
        ax.set_title(f"{name}, r = {r:.2f}", fontsize=7)
        ax.tick_params(labelsize=6)
        ax.set_xlabel("exact (nats)", fontsize=7)
        ax.set_xticks([-10, -0.1, 0.1, 10])
        ax.set_yticks([-10, -1, -0.1, 0, 0.1, 1, 10])
        ax.minorticks_off()
        ax.set_box_aspect(1)
    axes[0].set_ylabel("attributed (nats)", fontsize=7)
    return save(drawn, folder, "path_patching")

"""Ablations: what breaks when a part of the state is zeroed, replaced by its mean, or by another prompt's.

Any set of (channel, dimension) pairs can be taken out, here bands of equal size by half-life; `freeze` stops time for
the state and `forget` empties it. All are ordinary edits: one forward each. Resampling keeps the part's distribution,
which zero and mean do not (Chan et al. 2022, "Causal scrubbing"). Proof: tests/interp/test_ablation.py, on identities
and on planted circuits, whose answers under each ablation are known in closed form.

Here: bands of every layer's state, at all positions, on hidden prompts. The measure is the answer's logit less the mean
of the other values'; the answer's probability would not move before much of this is gone.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from analyses.hidden_reasoning import load_organism
from analyses.hidden_reasoning.task import MASKED, draw
from interp import Edit, ablate, at, decay_bands, half_lives, mean_dt, mean_of, run
from interp.plots.lens import BLUE, GREY, ORANGE

from ._save import save

STEPS, ROWS, BANDS = 4, 60, 6


@torch.no_grad()
def figure(folder: Path) -> list[Path]:
    """Draw what each band of each layer's state is worth to the answer's logit."""
    import matplotlib.pyplot as plt

    model, _ = load_organism("shallow")
    batch = draw(STEPS, ROWS, seed=[7, 3])
    ids, answer = batch.ids[:, :-1], batch.answer_ids
    others = MASKED.value_ids

    def margin(edits: Iterable[Edit] = ()) -> Tensor:
        scores = run(model, ids, edits, last_only=True).last_logits
        right = scores.gather(1, answer[:, None])[:, 0]
        return right - (scores[:, others].sum(1) - right) / (len(others) - 1)

    clean, dt = margin(), mean_dt(model, ids)
    lives = half_lives(model, dt)
    layers = range(model.config.n_layer)
    grid, axes = plt.subplots(len(layers), 1, figsize=(3.4, 4.6), sharex=True, sharey=True, constrained_layout=True)
    for layer, ax in zip(layers, axes, strict=True):
        place = at.ssm_state(layer=layer)
        bands = decay_bands(model, layer, BANDS, dt=dt[layer])
        values = {
            "zero": None,
            "mean": mean_of(model, [ids], place, by_position=True, progress=False),
            "resample": run(model, ids, record=[place], last_only=True)[place],
        }
        for i, (how, colour) in enumerate(zip(values, (GREY, ORANGE, BLUE), strict=True)):
            edits = [ablate(place, how, values=values[how], mask=band) for band in bands]
            lost = torch.stack([margin(e) - clean for e in edits])  # (bands, b)
            at_x = [j + 0.27 * (i - 1) for j in range(BANDS)]
            ax.bar(
                at_x, lost.mean(1), 0.25, yerr=lost.std(1) / ROWS**0.5, color=colour, label=how, error_kw={"lw": 0.8}
            )
        for j, band in enumerate(bands):
            ax.text(
                j, 0.03, f"{lives[layer][band].median():.0f}", transform=ax.get_xaxis_transform(), ha="center", size=6
            )
        ax.axhline(0, color="black", lw=0.6)
        ax.set_title(f"layer {layer}", fontsize=8, loc="left")
    axes[0].set_ylim(bottom=1.25 * axes[0].get_ylim()[0])  # room for the numbers
    axes[-1].set_xticks(range(BANDS), ["fastest", *[""] * (BANDS - 2), "slowest"])
    axes[-1].set_xlabel("band; number: median half-life (tokens)")
    grid.supylabel("change of the answer's margin (nats)", fontsize=10)
    axes[0].legend(fontsize=6, frameon=False, ncols=3, loc="center right")
    return save(grid, folder, "ablation")

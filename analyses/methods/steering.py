"""Steering: whether adding a direction changes the answer, and by more than any direction of its size.

The direction is the difference between the mean activations of two sets of prompts (Turner et al. 2023,
arXiv:2308.10248); it is added, or projected out, at any positions, also those still to be generated. One forward a
strength; the control is random directions of the same size. Proof: tests/interp/test_steering.py, where one pass equals
token by token.

Here: from answers of 3 to answers of 1, found on some prompts and tried on others.
"""

from pathlib import Path

import torch
from torch import Tensor

from analyses.hidden_reasoning import load_organism
from analyses.hidden_reasoning.task import MASKED, draw
from interp import at, contrast, logit_diff, run, steering_curve, steering_plot

from ._save import save

TO, FROM, LAYER = 1, 3, 2


def figure(folder: Path) -> list[Path]:
    """Draw the logit difference of two answers against strength."""
    model, _ = load_organism("shallow")
    batch = draw(5, 600, seed=[7, 5])
    ids, last = batch.ids[:, :-1], batch.values[:, -1]
    found, tried = torch.arange(600) < 300, torch.arange(600) >= 300
    place = at.resid_post(layer=LAYER, pos=-1)
    with torch.no_grad():
        sets = [run(model, ids[found & (last == v)], record=[place], last_only=True)[place] for v in (TO, FROM)]
    to, other = (int(MASKED.value_ids[v]) for v in (TO, FROM))

    def metric(logits: Tensor) -> Tensor:
        return logit_diff(logits, to, other)

    strengths = [-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]
    curve = steering_curve(
        model,
        ids[tried & (last == FROM)],
        contrast(place, *sets),
        metric,
        strengths,
        pos=-1,
        controls=10,
        progress=False,
    )
    ax = steering_plot(curve, label=f"logit({TO}) - logit({FROM}) (nats)")
    ax.axhline(0, color="black", lw=0.6, ls=":")
    ax.set_title(f"answers of {FROM}, steered after layer {LAYER}", fontsize=9)
    return save(ax.figure, folder, "steering")

"""Tuned lens: what the model will answer, read from each layer's stream by an affine map that is learned.

Belrose et al. 2023 (arXiv:2303.08112); on Mamba, Paulo et al. 2024 (arXiv:2404.05971). Proof:
tests/interp/test_tuned_lens.py: a planted map, L-BFGS, and scores that are those of whole runs.

Here: the model of 12 layers on hidden prompts. Left, how far each layer's lens is from what the model will say at every
word; right, what it gives the right answer at the end, on prompts of which neither lens was made.
"""

from pathlib import Path

from analyses.hidden_reasoning import load_organism
from analyses.hidden_reasoning.task import draw
from interp import lens_curve, logit_lens, tuned_lens
from interp.plots.tuned_lens import draw_means

from ._save import save

STEPS, ROWS, ASKED = 5, 600, 300


def figure(folder: Path) -> list[Path]:
    """Draw both lenses by layer."""
    import matplotlib.pyplot as plt

    model, _ = load_organism("masked")
    made = tuned_lens(model, draw(STEPS, ROWS, seed=[7, 1]).ids[:, :-1], progress=False)
    asked = draw(STEPS, ASKED, seed=[7, 2]).ids
    fig, (left, right) = plt.subplots(1, 2, figsize=(6.8, 2.6), constrained_layout=True)
    lens_curve(made, ax=left)
    for lens, label in ((made, "tuned lens"), (None, "logit lens")):
        said = logit_lens(model, asked[:, :-1], asked[:, -1:], pos=-1, log_probs=True, lens=lens)
        draw_means(right, said[..., 0].exp(), label)
    right.axhline(0.2, color="black", lw=0.8, ls=":", label="chance")
    right.set_xlabel("stream before layer; 12: the model's")
    right.set_xticks(range(0, model.config.n_layer + 1, 2))
    right.set_ylabel("p(answer) at the end")
    right.set_ylim(-0.03, 1.03)
    right.legend(fontsize=7, frameon=False, loc="upper left")
    return save(fig, folder, "tuned_lens")

"""Alignment: in how many dimensions of a memory a value is, so that it is handed over when they are swapped.

Distributed alignment search (Geiger et al. 2023, arXiv:2303.02536) finds the k dimensions of a site by gradient descent
on what their swap makes the model answer, on some pairs of prompts, and scores them on others, beside random dimensions
and a search for shuffled answers (`interp.alignment`). Here: the conv states of all layers of the model that ships,
after the second of four operations, between unrelated prompts; the target is what the base's operations to come make of
the donor's value. Cost: a minute. Proof: `tests/interp/test_alignment.py`.
"""

from pathlib import Path

from analyses.hidden_reasoning import load_organism
from analyses.hidden_reasoning.experiments.aligning import unrelated
from analyses.hidden_reasoning.task import MASKED
from interp import align, alignment_curve, at

from ._save import save

STEPS, STEP, PAIRS, SEED, EPOCHS = 4, 2, 600, 1, 40
DIMENSIONS, WITH_CONTROLS = (1, 2, 3, 4, 6), (4,)


def figure(folder: Path) -> list[Path]:
    """Held-out interchange accuracy against the number of dimensions: alignment.png and .pdf."""
    import matplotlib.pyplot as plt

    model, _ = load_organism("shallow")
    ids, others, targets, pos = unrelated(MASKED, STEPS, STEP, PAIRS, SEED)
    place = at.conv_state(layer=slice(None), pos=pos)
    found = [
        align(
            model, ids, others, targets, place, k, dims=64, epochs=EPOCHS, seeds=int(k in WITH_CONTROLS), progress=False
        )
        for k in DIMENSIONS
    ]
    with plt.rc_context({"font.size": 7, "axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42}):
        fig, ax = plt.subplots(figsize=(3.4, 2.6), constrained_layout=True)
        alignment_curve(found, ax=ax, legend=False)
        fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=6)
    return save(fig, folder, "alignment", palette=True)

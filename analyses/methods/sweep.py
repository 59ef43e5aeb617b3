"""Patch sweep: where in the model, and in which part of the state, the answer is.

Each cell puts another value into one layer, position and part of a site, here the state of a prompt that differs in one
operation, and asks how far the answer moves. Both directions: the donor's value into the base run, and the base's into
the donor run (denoising and noising, Heimersheim & Nanda 2024, arXiv:2404.15255). Every cell is exactly one run under
that edit; cells run together, each only from the layer and position that it touches on, at a third of a forward a cell.
Proof: `tests/interp/test_sweep_cells.py` against whole runs, `tests/interp/test_sweep_hf.py` against HF's model,
`tests/interp/test_sweep_saved.py` for sweeps that are interrupted, damaged or replayed.

The figure: the shipped model, state by layer and word; where a dot is, the 95 % interval over the pairs holds zero.
Below, at the last word and layer by layer, which bands of the state's half-lives carry the value.
"""

from pathlib import Path

from torch import Tensor

from analyses.hidden_reasoning import MASKED, load_organism, pairs
from analyses.hidden_reasoning.experiments.patching import words
from interp import heatmap, logit_diff, patch_grid
from interp.sweep import bands

from ._save import save

STEPS, PAIRS = 4, 24
WORDS = words(MASKED, STEPS, differ=1)
CUTS = (2.0, 8.0, 32.0)  # half-lives in tokens


def figure(folder: Path) -> list[Path]:
    """Draw the sweep by layer and word, and by band, into `sweep.png` and `sweep.pdf`."""
    import matplotlib.pyplot as plt

    model, _ = load_organism("shallow")
    drawn = pairs(STEPS, PAIRS, [12, 1], which_step=1)

    def metric(logits: Tensor) -> Tensor:
        return logit_diff(logits, drawn.donor_answer, drawn.base_answer)

    ids, donor_ids = drawn.base_ids, drawn.donor_ids
    grid = patch_grid(model, ids, donor_ids, site="ssm_state", metric=metric, both=True, progress=False)
    parts = patch_grid(
        model, ids, donor_ids, site="ssm_state", metric=metric, positions=-1, parts=bands(model, CUTS), progress=False
    )
    assert grid.noising is not None and parts.parts is not None
    with plt.rc_context({"font.size": 7, "axes.titlesize": 8, "pdf.fonttype": 42}):
        fig, axes = plt.subplots(3, 1, figsize=(3.4, 4.4), constrained_layout=True)
        for ax, one, title in (
            (axes[0], grid, "donor's state into base (denoising)"),
            (axes[1], grid.noising, "base's state into donor (noising)"),
        ):
            heatmap(one, ax=ax, tokens=WORDS, limit=1.0, interval=0.95, title=title)
        axes[0].set_xlabel("")
        axes[0].tick_params(labelbottom=False)
        axes[1].set_xlabel(f"word after which it is put in ({PAIRS} pairs, which differ in {WORDS[2]})")
        names = [name.removeprefix("half-life ") for name in parts.parts]
        heatmap(
            parts, ax=axes[2], tokens=names, limit=1.0, interval=0.95, title="parts of the donor's state, last word"
        )
        axes[2].tick_params(axis="x", rotation=0)
        axes[2].set_xlabel("half-life of the part (tokens)")
        return save(fig, folder, "sweep")

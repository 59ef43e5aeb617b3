"""Hidden attention: with what weight a token of a layer reads each token before it.

The scan alone is y = M u (Ali, Zimerman & Wolf 2024, arXiv:2403.01590); the block form goes from the conv's input to
the layer's output, with conv, SiLU, D and gate (after Zimerman, Ali & Wolf 2024, arXiv:2405.16504). Both sum to the
run's own output, to 1e-10 in float64: `tests/interp/test_attention.py`. The scan's map says at which token something
was written, the block's from which tokens it came there by the conv. Neither says what a token does to the answer: for
that there is `knockout`. Cost: one forward, and of each target as many steps of (e, n) as there are tokens before it.

The figure: one layer of the shipped model, the mean over prompts of the size in d_model of what a source brings to a
target's output.
"""

from pathlib import Path

from analyses.hidden_reasoning import MASKED, load_organism, pairs
from analyses.hidden_reasoning.experiments.patching import words
from interp import attention, attention_map

from ._save import save

LAYER, STEPS, PROMPTS = 3, 4, 32
WORDS = words(MASKED, STEPS)


def figure(folder: Path) -> list[Path]:
    """Draw the maps of the scan and of the block into `attention.png` and `attention.pdf`."""
    import matplotlib.pyplot as plt

    model, _ = load_organism("shallow")
    ids = pairs(STEPS, PROMPTS, [11, 0]).base_ids
    with plt.rc_context({"font.size": 7, "axes.titlesize": 8, "pdf.fonttype": 42}):
        fig, axes = plt.subplots(2, 1, figsize=(3.4, 5.3), sharex=True, constrained_layout=True)
        for ax, form, title in zip(
            axes, ("scan", "block"), ("scan: tokens that wrote", "block: tokens before the conv"), strict=True
        ):
            found = attention(model, ids, layer=LAYER, form=form, reduce="norm")
            attention_map(found, ax=ax, tokens=WORDS, title=f"Layer {LAYER}, {title}")
        axes[0].set_xlabel("")
        return save(fig, folder, "attention")

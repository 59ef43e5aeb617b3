"""Linear probes: where can a line read a value that no word shows, by site, layer and position.

A probe is trained on some prompts and scored on others, beside what the same pipeline reads from shuffled labels and
from noise with the features' mean and covariance (`interp.probes`). A probe that reads says that the value is there,
not that the model uses it; patching and projections do. Here: the value so far of the hidden prompts of the model that
ships, at each word of the written-out part, against what the word itself gives away (the best guess that knows only the
last operation). The bars are 95 % intervals. Cost: one forward a layer, and (1 + seeds) * folds small
eigendecompositions a cell. Source: Alain & Bengio 2016 (arXiv:1610.01644); Hewitt & Liang 2019 (arXiv:1909.03368).
Proof: `tests/interp/test_probes.py`.
"""

from pathlib import Path

from analyses.hidden_reasoning.experiments.probing import last_word_alone
from analyses.hidden_reasoning.organism import load_organism
from analyses.hidden_reasoning.task import MASKED, draw
from interp import probe_curves, probe_grid

from ._save import save

STEPS, ROWS, SEED = 6, 180, [11, 0]
SITES = {"ssm_state": "SSM state", "conv_state": "conv state", "resid_post": "residual stream after the layer"}


def figure(folder: Path) -> list[Path]:
    """Accuracy by position and layer, one panel a site: probes.png and .pdf."""
    import matplotlib.pyplot as plt

    model, _ = load_organism("shallow")
    rows = draw(STEPS, ROWS, SEED)
    labels = rows.ids.new_full(rows.ids.shape, -1)
    labels[:, STEPS + 3 :] = rows.values.repeat_interleave(2, 1)  # at the echo of each operation, and after it
    positions = range(STEPS + 5, rows.ids.shape[1] - 1)  # from the second on: the first word is its own value
    words = [w for j in range(1, STEPS) for w in (f"op{j + 1}", "[_]")][:-1]
    alone = [share for share in last_word_alone(MASKED, STEPS)[1:] for _ in range(2)][:-1]
    with plt.rc_context(
        {"font.size": 7, "axes.titlesize": 7, "axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42}
    ):
        fig, axes = plt.subplots(3, 1, figsize=(3.4, 4.5), sharex=True, sharey=True, constrained_layout=True)
        for ax, (site, title) in zip(axes, SITES.items(), strict=True):
            grid = probe_grid(
                model,
                rows.ids[:, :-1],
                labels[:, :-1],
                site=site,
                positions=positions,
                folds=4,
                seeds=1,
                progress=False,
            )
            shown = {"shuffled": "shuffled labels", "noise": "noise like the features"}
            probe_curves(grid, ax=ax, tokens=words, title=title, controls=shown, legend=False)
            ax.plot(range(len(alone)), alone, color="0.3", lw=0.8, ls=":", label="from the last operation alone")
            ax.set_xlabel("")
        axes[-1].set_xlabel("word at which the value so far is read")
        handles, names = axes[0].get_legend_handles_labels()
        fig.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=6)
    return save(fig, folder, "probes", palette=True)

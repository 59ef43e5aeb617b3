"""Which part of the model's graph is enough for the metric: edges are ranked and pruned, the rest is run alone.

`faithfulness` runs a circuit exactly: every edge outside carries what the donor run sends there (Conmy et al. 2023;
Hanna et al. 2024). It costs the ranking, and 5 rows of a forward for each circuit. The first figure is the circuit
found in the planted model `recall`, whose truth is known; the second how much circuits of growing size carry in the
model that ships. tests/interp/test_circuit.py holds a circuit's run to an evaluation of the graph in plain PyTorch,
and the circuits found to the planted ones.
"""

from pathlib import Path

from torch import Tensor

from analyses.hidden_reasoning import load_organism, pairs
from analyses.planted import plant
from interp import circuit as draw
from interp import edge_attribution, faithfulness, logit_diff, prune

from ._save import save

ROWS, STEPS = 8, 8
SIZES = (0, 100, 150, 200, 300, 400, 600, 800, 1000)
FEW = (25, 50)  # so few of those ranked at the base do not yet make a way


def figure(folder: Path) -> list[Path]:
    """The planted circuit, and faithfulness against the number of edges in the model that ships."""
    return [*_planted(folder), *_curve(folder)]


def _planted(folder: Path) -> list[Path]:
    p = plant("recall", 1)
    ways = ((p.ids, p.donor_ids), (p.donor_ids, p.ids))
    found = prune(*(edge_attribution(p.model, *ids, p.metric) for ids in ways), threshold=0.02)
    score = float(faithfulness(p.model, found, p.ids, p.donor_ids, p.metric, progress=False).score())
    ax = draw(found, unit="nats", title=f"recall: {len(found)} edges carry {score:.0%}")
    ax.title.set_fontsize(8)
    return save(ax.figure, folder, "circuit")


def _curve(folder: Path) -> list[Path]:
    import matplotlib.pyplot as plt

    model, _ = load_organism("shallow")
    found = pairs(num_steps=4, n=ROWS, which_step=1, seed=0)
    prompts = (model, found.base_ids, found.donor_ids)

    def metric(logits: Tensor) -> Tensor:
        return logit_diff(logits, found.base_answer, found.donor_answer)

    drawn, ax = plt.subplots(figsize=(3.4, 2.1), constrained_layout=True)
    for steps, sizes, colour, marker, name in (
        (None, SIZES, "#D55E00", "s", "at the base"),
        (STEPS, sorted({*SIZES, *FEW}), "#0072B2", "o", f"{STEPS} points on the way"),
    ):
        effects = edge_attribution(*prompts, metric, steps=steps)
        several = [prune(effects, keep=keep) for keep in sizes]
        carried = faithfulness(*prompts[:1], several, *prompts[1:], metric, progress=False)
        ax.errorbar(
            carried.sizes, carried.score(), yerr=carried.error(), color=colour, marker=marker, markersize=3,
            linewidth=1, elinewidth=0.6, label=f"edges ranked {name}",
        )  # fmt: skip
    for level in (0, 1):
        ax.axhline(level, color="0.7", linewidth=0.6, zorder=0)
    ax.set_xlabel(f"edges kept, of {len(effects.edges)}", fontsize=8)
    ax.set_ylabel("share of the metric carried", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.legend(fontsize=6, frameon=False, title=f"± 1 standard error, {ROWS} pairs", title_fontsize=6)
    return save(drawn, folder, "circuit_faithfulness")

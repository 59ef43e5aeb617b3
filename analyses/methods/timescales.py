"""Time scales: how long each part of the state remembers, and how far back each layer looks.

The half-life of a (channel, dimension) pair is ln 2 / (dt |A|) tokens, dt the mean of the run (Gu & Dao 2023,
arXiv:2312.00752, Eq. 4). The receptive field is measured and no bound: the size of what each earlier token wrote, in
what is read at the last position. One forward, and one pass back over the positions. Proof:
tests/interp/test_timescales.py, on even time, where all of it is a geometric series.
"""

from pathlib import Path

from analyses.hidden_reasoning import load_organism
from analyses.hidden_reasoning.task import draw
from interp import field_curves, half_life_curves, half_lives, mean_dt, receptive_field

from ._save import save


def figure(folder: Path) -> list[Path]:
    """Draw half-lives and receptive fields of all layers."""
    import matplotlib.pyplot as plt

    model, _ = load_organism("shallow")
    ids = draw(5, 200, seed=[7, 4]).ids[:, :-1]
    made, (above, below) = plt.subplots(2, 1, figsize=(3.4, 4.4), constrained_layout=True)
    half_life_curves(half_lives(model, mean_dt(model, ids)), ax=above, length=ids.shape[1])
    field_curves([receptive_field(model, ids, layer) for layer in range(model.config.n_layer)], ax=below)
    return save(made, folder, "timescales")

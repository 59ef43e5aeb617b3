"""The picture of a grid of probes: what it shows, who is who in it, and that all of it can be seen."""

import pytest
import torch
from helpers import names_drawn, tiny

from interp import probe_curves, probe_grid
from interp.probes import LinearProbe, ProbeGrid
from minimal_mamba.errors import InputError

MODEL = tiny(seed=9)


def test_the_plot_says_what_it_shows():
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    ids = torch.randint(0, 29, (40, 3), generator=torch.Generator().manual_seed(0))
    grid = probe_grid(MODEL, ids, ids % 2, site="u", progress=False, seeds=2)
    ax = probe_curves(grid, tokens=list("abc"), title="u", controls={"shuffled": "shuffled", "noise": "noise"})
    assert ax.get_xlabel() == "token" and ax.get_ylabel() == "held-out accuracy" and ax.get_title() == "u"
    texts = [t.get_text() for t in ax.get_legend().get_texts()]
    assert {"layer 0", "layer 2", "shuffled", "noise", "commonest class"} <= set(texts)
    lines = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
    assert list(lines["commonest class"]) == grid.values("chance").mean(0).tolist()
    points = next(c for c in ax.containers if c.get_label() == "layer 1")[0].get_ydata()
    assert list(points) == grid.values()[1].tolist()
    numbers = probe_grid(MODEL, ids, ids.double(), site="u", progress=False, seeds=0)
    assert probe_curves(numbers, legend=False).get_ylabel() == "held-out $R^2$"
    with pytest.raises(InputError, match="2 labels for the grid's 3"):
        probe_curves(grid, tokens=["a", "b"])
    plt.close("all")


def curves(layers, positions, **options):
    """The plot of probes whose scores rise with the layer."""
    pytest.importorskip("matplotlib").use("Agg")
    classes, nothing = options.pop("classes", ("a", "b")), torch.empty(0)

    def found(layer):
        score = 0.3 + 0.6 * layer / layers
        return LinearProbe(score, (score - 0.05, score + 0.05), 0.25, {"shuffled": (0.2 + layer / 1000,)}, classes,
                           *[nothing] * 6, 1, 8, 8)  # fmt: skip

    rows = tuple(tuple(found(layer) for _ in range(positions)) for layer in range(layers))
    return probe_curves(ProbeGrid(rows, "u", tuple(range(layers)), tuple(range(positions))), **options)


@pytest.mark.parametrize("layers", [6, 7, 24])
def test_no_two_layers_look_alike_and_each_stays_at_its_position(layers):
    import matplotlib.pyplot as plt

    ax = curves(layers, 3)
    drawn = [bars[0] for bars in ax.containers]
    assert len({(line.get_color(), line.get_marker()) for line in drawn}) == len(drawn) == layers
    assert all(abs(line.get_xdata() - torch.arange(3).numpy()).max() < 0.4 for line in drawn)
    named = [text.get_text() for text in ax.get_legend().get_texts()]
    if layers == 6:
        assert {f"layer {i}" for i in range(6)} <= set(named) and len(ax.figure.axes) == 1
    else:  # a bar has their colours, from dark to light
        assert named == ["shuffled labels", "commonest class"]
        bar = ax.figure.axes[1]
        shown = names_drawn(bar, "y")
        assert bar.get_ylabel() == "layer" and shown[0] == "0" and len(shown) >= 5
        light = [sum(line.get_color()[:3]) for line in drawn]
        assert light == sorted(light)
    plt.close("all")


@pytest.mark.parametrize("layers", [2, 6, 24])
@pytest.mark.parametrize("title", ["", "a title"])
def test_the_legend_is_beside_what_is_drawn_and_on_the_figure(layers, title):
    import matplotlib.pyplot as plt

    ax = curves(layers, 4, title=title, controls={"shuffled": "labels that are shuffled"})
    ax.figure.canvas.draw()
    legend, frame = ax.get_legend().get_window_extent(), ax.get_window_extent()
    assert legend.y0 >= frame.y1 - 1 and legend.x0 >= 0 and legend.x1 <= ax.figure.bbox.x1
    assert legend.y1 <= (ax.title.get_window_extent().y0 if title else ax.figure.bbox.y1)
    assert frame.height > ax.figure.bbox.height / 3
    plt.close("all")


def test_of_one_position_the_controls_show_and_numbers_are_held_to_their_mean():
    import matplotlib.pyplot as plt

    ax = curves(12, 1, classes=None)
    (line,) = (line for line in ax.get_lines() if line.get_label() == "mean of the labels")
    band = ax.collections[0].get_paths()[0].get_extents()
    assert line.get_xdata()[1] - line.get_xdata()[0] > 0.5 and band.width > 0.5 and band.height == pytest.approx(0.011)
    plt.close("all")

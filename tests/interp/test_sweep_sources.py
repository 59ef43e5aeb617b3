"""What a patch grid puts in, and where: sources, parts, several metrics, both directions, intervals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import names_drawn, tiny

from interp import (
    Add,
    Grid,
    Mean,
    Scale,
    Set,
    Zero,
    ablate,
    at,
    decay_bands,
    heatmap,
    log_prob,
    logit_diff,
    patch_grid,
    run,
)
from interp.sweep import bands, groups
from minimal_mamba.errors import AddressError, EditError, InputError, ShapeMismatch

MODEL = tiny(seed=6)
N, B, L = MODEL.config.n_layer, 3, 6
RNG = torch.Generator().manual_seed(0)
IDS, DONOR = (torch.randint(0, 29, (B, L), generator=RNG) for _ in range(2))
PLACES = [(layer, pos) for layer in range(N) for pos in range(L)]


def score(logits):
    return logit_diff(logits, 3, 5)


def sweep(*args, **kwargs):
    given = {"site": "ssm_state", "metric": score, "progress": False}
    return patch_grid(MODEL, *(args or (IDS, DONOR)), **given | kwargs)


@torch.no_grad()
def under(edits, ids=IDS, **kwargs):
    return score(run(MODEL, ids, edits, **kwargs).logits)


def close(one, two):
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_zero_mean_and_a_function():
    zero, mean = sweep(IDS, source="zero"), sweep(IDS, source="mean")
    function = sweep(IDS, source=lambda place: Scale(place, 2.0))
    several = sweep(IDS, source=lambda place: ablate(place, "zero", rows=[1]))
    for layer, pos in PLACES:
        place = at.ssm_state(layer=layer, pos=pos)
        close(zero.values[layer, pos], under(Zero(place)))
        close(mean.values[layer, pos], under(Mean(place)))
        close(function.values[layer, pos], under(Scale(place, 2.0)))
        close(several.values[layer, pos], under(Zero(place, rows=[1])))
    close(several.values[..., 0], several.base[0].expand(N, L))
    with pytest.raises(InputError, match=r"no donor to normalise by.*normalise=False"):
        zero.recovered()
    low, high = zero.interval(normalise=False)
    assert (low <= zero.effect().mean(-1)).all() and (zero.effect().mean(-1) <= high).all()
    close(sweep(source="zero").donor, score(run(MODEL, DONOR).logits).detach())


def test_the_mean_is_over_each_rows_own_position():
    lengths = [6, 3, 5]
    grid = sweep(IDS, source="mean", positions=[-2, 1], lengths=lengths, site="resid_post")
    with torch.no_grad():
        for layer in range(N):
            for column, pos in enumerate((-2, 1)):
                place = at.resid_post(layer=layer, pos=pos)
                value = run(MODEL, IDS, record=[place], lengths=lengths)[place].mean(0, keepdim=True)
                out = run(MODEL, IDS, Set(place, value), lengths=lengths, last_only=True)
                close(grid.values[layer, column], score(out.logits))


def test_noise_comes_from_the_seed_and_the_place():
    one, two = sweep(IDS, source="noise", seed=1, std=0.5), sweep(IDS, source="noise", seed=1, std=0.5, layers=[2])
    close(two.values[0], one.values[2])
    assert (sweep(IDS, source="noise", seed=2, std=0.5).values - one.values).abs().min() > 0
    close(sweep(IDS, source="noise", std=0.0).values, one.base.expand(N, L, B))
    seen = []

    def keep(place):
        seen.append(place)
        return Add(place, 0.0)

    sweep(IDS, source=keep, parts={"some": {"n": [0, 2]}})
    assert seen[0] == at.ssm_state(layer=0, pos=0, n=[0, 2]) and len(seen) == N * L
    big = patch_grid(MODEL, IDS, site="embed", source="noise", std=1e-3, metric=score, progress=False)
    twice = patch_grid(MODEL, IDS, site="embed", source="noise", std=2e-3, metric=score, progress=False)
    torch.testing.assert_close(twice.effect(), 2 * big.effect(), rtol=0.1, atol=1e-4)  # to first order


@pytest.mark.parametrize("source", ["donor", "mean", "zero"])
def test_parts(source):
    mask = torch.rand(N, 24, 5, generator=RNG) < 0.3
    parts = {
        "channels": {"e": [0, 5]}, "one": {"n": -1}, "both": {"e": slice(3, 9), "n": [1, 0]},
        "mask": mask[0], "by layer": mask,
    }  # fmt: skip
    grid = sweep(parts=parts, source=source, positions=[1, 4])
    assert grid.values.shape == (N, 2, 5, B) and grid.parts == tuple(parts)
    whole = at.ssm_state()
    with torch.no_grad():
        clean = run(MODEL, IDS, record=[whole])[whole]
        if source == "donor":
            value = run(MODEL, DONOR, record=[whole])[whole]
        else:
            value = clean.mean(1, keepdim=True).expand_as(clean) * (source == "mean")
        for layer in range(N):
            for column, pos in enumerate((1, 4)):
                for k, part in enumerate(parts.values()):
                    if isinstance(part, dict):
                        chosen = torch.zeros(24, 5, dtype=torch.bool)
                        e, n = (torch.arange(s)[part.get(a, slice(None))] for a, s in (("e", 24), ("n", 5)))
                        chosen[e.reshape(-1, 1), n.reshape(1, -1)] = True
                    else:
                        chosen = part.expand(N, 24, 5)[layer]
                    # of a single edit, what is there before it is the base run's
                    put = torch.where(chosen, value[layer, :, pos], clean[layer, :, pos])
                    close(grid.values[layer, column, k], under(Set(at.ssm_state(layer=layer, pos=pos), put)))


def test_parts_of_layers_patched_together_and_names():
    mask = torch.rand(N, 24, 5, generator=RNG) < 0.5
    grid = sweep(parts={"m": mask, "rest": ~mask, "all": torch.ones(24, 5, dtype=torch.bool)}, layers=[range(N)])
    whole = sweep(layers=[range(N)])
    close(grid.values[:, :, 2], whole.values)
    assert (grid.values[:, :, 0] - whole.values).abs().max() > 1e-3
    assert list(groups(MODEL, "n", 2)) == ["n 0-1", "n 2-3", "n 4-4"] and len(groups(MODEL, "e")) == 24
    made = bands(MODEL, [1.0, 4.0])
    assert set(made) <= {"half-life < 1", "half-life 1-4", "half-life >= 4"}
    assert torch.equal(sum(m.int() for m in made.values()), torch.ones(N, 24, 5, dtype=torch.int))
    for i in range(N):
        assert torch.equal(bands(MODEL, 3)["band 1 of 3"][i], decay_bands(MODEL, i, 3)[0])
    recurrent = sweep(site="recurrent_state", parts={"half": {"e": slice(12)}})
    place = at.recurrent_state(layer=1, pos=2, e=slice(12))
    with torch.no_grad():
        close(recurrent.values[1, 2, 0], under(Set(place, run(MODEL, DONOR, record=[place])[place])))


def test_several_metrics_and_both_directions():
    named = {"diff": score, "log p": lambda logits: log_prob(logits, 4)}
    found = sweep(metric=named, both=True)
    assert list(found) == list(named)
    for name, metric in named.items():
        there, back = sweep(metric=metric), sweep(DONOR, IDS, metric=metric)
        for mine, alone in ((found[name], there), (found[name].noising, back)):
            torch.testing.assert_close(mine.values, alone.values, rtol=0, atol=0)
            assert torch.equal(mine.base, alone.base) and torch.equal(mine.donor, alone.donor)
        torch.testing.assert_close(found[name].noising.base, found[name].donor, rtol=1e-12, atol=1e-12)


def test_the_bootstrap_interval_covers_the_truth():
    rng = torch.Generator().manual_seed(0)
    hits, widths, errors = 0, [], []
    for _ in range(200):
        donor = 2 + torch.randn(60, generator=rng, dtype=torch.float64)
        values = 0.3 * donor + 0.5 * torch.randn(60, generator=rng, dtype=torch.float64)
        grid = Grid(values[None, None], torch.zeros(60).double(), donor, "u", (0,), (0,))
        low, high = grid.interval(0.9, draws=400)
        assert low.shape == (1, 1) and low <= grid.recovered() <= high
        hits += bool(low <= 0.3 <= high)
        widths.append((high - low).item())
        errors.append(grid.recovered_error().item())
    assert 0.82 < hits / 200 < 0.96
    assert sum(widths) / sum(errors) == pytest.approx(2 * 1.645, rel=0.08)  # the delta method's
    with pytest.raises(InputError, match="level=95: a share"):
        grid.interval(95)


def test_errors():
    cases = [
        (EditError, {"source": "zeros"}, "source='zeros': Did you mean 'zero'"),
        (EditError, {"source": "zero", "both": True}, "goes with source='donor'"),
        (EditError, {"parts": {}}, "parts is empty"),
        (EditError, {"parts": {"a": {"d": 1}}}, "part 'a': {'d': 1} names no axes of ssm_state"),
        (EditError, {"parts": {"a": {}}}, "names no axes"),
        (AddressError, {"parts": {"a": {"n": [5]}}}, r"n=5 does not exist here: there are indices 0\.\.4"),
        (ShapeMismatch, {"parts": {"a": torch.ones(24, 5)}}, r"mask \(24, 5\) of torch.float32; a mask of ssm_state"),
        (ShapeMismatch, {"parts": {"a": torch.ones(5, 24, dtype=torch.bool)}}, r"\(24, 5\) or, layer by layer"),
        (ShapeMismatch, {"parts": {"a": torch.zeros(24, 5, dtype=torch.bool)}}, "not empty"),
        (EditError, {"parts": {"a": torch.ones(24, 5, dtype=torch.bool)}, "source": Zero}, "function cannot edit"),
        (InputError, {"memory": 10}, "too little for one cell"),
    ]
    for error, kwargs, text in cases:
        with pytest.raises(error, match=text):
            sweep(**kwargs)
    with pytest.raises(InputError, match="a donor is needed"):
        sweep(IDS)
    with pytest.raises(InputError, match="mean over a batch of one row"):
        sweep(IDS[:1], source="mean")
    with pytest.raises(InputError, match="differ in shape"):
        sweep(IDS, DONOR[:, :-1], source="zero")


SCRIPT = """
import importlib, sys, torch
from minimal_mamba import Mamba, MambaConfig, Zero, at
from interp import run, sweep

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

torch.set_num_threads(1)
torch.manual_seed(0)
sizes = dict(d_model=64, d_state=int(sys.argv[2]))
model = Mamba(MambaConfig(n_layer=2, vocab_size=50, **sizes)).eval()
ids = torch.randint(0, 50, (8, int(sys.argv[3])))
cells = [[Zero(at.ssm_state(layer=i, pos=p))] for i in range(2) for p in range(5)]
importlib.import_module("interp.sweep.engine").TOKENS = 1 << 40  # the memory alone decides
with torch.no_grad():
    run(model, ids[:1], cells[0], backend=sys.argv[1], last_only=True)
before = peak()
found = sweep(model, ids, cells, lambda x: x[:, -1, 0], memory=int(sys.argv[4]), backend=sys.argv[1], progress=False)
print(peak() - before, len(found.groups))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize(("backend", "d_state", "length", "mib"), [("torch", 64, 32, 20), ("reference", 16, 128, 32)])
def test_a_sweep_stays_within_its_memory(backend, d_state, length, mib):
    """Measured in a process of its own: at most what was allowed, and at least a third, so that none lies idle."""
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(root), "MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_ARENA_MAX": "1"}
    memory = mib << 20
    args = [sys.executable, "-c", SCRIPT, backend, str(d_state), str(length), str(memory)]
    done = subprocess.run(args, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown, count = map(int, done.stdout.split())
    assert count > 1  # the budget is what stopped a group
    assert memory / 3 < grown < memory * 1.1


def test_a_heat_map_of_parts_and_of_intervals():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    parts = groups(MODEL, "n", 2)

    def labels(grid, **kwargs):
        ax = heatmap(grid, normalise=False, **kwargs)
        image = ax.images[0].get_array()
        axes = [[t.get_text() for t in ticks] for ticks in (ax.get_yticklabels(), ax.get_xticklabels())]
        return image, *axes, (ax.get_ylabel(), ax.get_xlabel()), ax

    one = sweep(parts=parts, positions=[4])
    image, rows, columns, names, _ = labels(one)
    assert (rows, columns, names) == (["0", "1", "2"], list(parts), ("layer", "part"))
    torch.testing.assert_close(torch.tensor(image.data), one.effect().mean(-1)[:, 0])
    layer = sweep(parts=parts, layers=[1])
    image, rows, columns, names, _ = labels(layer)
    assert (rows, columns, names) == (list(parts), [str(p) for p in range(L)], ("part", "position"))
    torch.testing.assert_close(torch.tensor(image.data), layer.effect().mean(-1)[0].T)
    with pytest.raises(InputError, match="3 layers, 6 positions and 3 parts has three axes"):
        heatmap(sweep(parts=parts), normalise=False)
    values = torch.tensor([[[1.0, 1.1, 0.9], [-1.0, 1.0, 0.1]]], dtype=torch.float64)  # clear, and not
    *_, ax = labels(Grid(values, torch.zeros(3).double(), torch.ones(3).double(), "u", (0,), (0, 1)), interval=0.9)
    assert ax.collections[0].get_offsets().tolist() == [[1.0, 0.0]]
    assert ax.figure.axes[1].get_ylabel() == "effect\ndot: 90 % interval holds 0"


@pytest.mark.parametrize(("layers", "title"), [([1], None), ([0, 1, 2], None), ([0, 1, 2], "a title")])
def test_a_figure_has_room_for_the_names_of_its_parts_and_for_the_colour_bar(layers, title):
    pytest.importorskip("matplotlib").use("Agg")
    parts = {
        f"half-life {low} to {2 * low}": group
        for low, group in zip((2, 4, 8), groups(MODEL, "n", 2).values(), strict=True)
    }
    ax = heatmap(
        sweep(parts=parts, positions=[4], layers=layers), interval=0.95, normalise=False, unit="nats", title=title
    )
    assert names_drawn(ax, "x") == list(parts)  # draws it: a layout that gives up warns
    assert ax.get_window_extent().height / ax.figure.dpi > 1.2
    bar = ax.figure.axes[1]
    boxes = [ax.get_tightbbox(), bar.get_tightbbox(), bar.yaxis.label.get_window_extent()]
    assert all(
        box.x0 >= 0 and box.y0 >= 0 and box.x1 <= ax.figure.bbox.x1 and box.y1 <= ax.figure.bbox.y1 for box in boxes
    )
    assert 6 <= bar.yaxis.label.get_size() <= 10

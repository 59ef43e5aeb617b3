"""Probes find what is planted, and nothing through any control; nothing of a held-out row is ever fitted."""

import importlib
import math
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import tiny

from analyses.planted import plant
from interp import Add, Project, at, collect, probe, probe_grid, run
from interp.probe_fit import PENALTIES, How, MissingExtra, Space, fit, interval, like
from interp.probe_rows import alike, permute, same_so_far
from minimal_mamba import Mamba, MambaConfig
from minimal_mamba.errors import AddressError, EditError, InputError

MODEL = tiny(seed=9)
IDS = torch.tensor([[5, 5, 3, 5, 5, 5], [5, 3, 5, 3, 3, 5]])
D, E, N, LAYERS, TICK = 4, 8, 6, 2, 3


def rows(n, f, seed=0):
    return torch.randn(n, f, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def binomial(p, n, z=4.0):
    """How far a share of n may be from p."""
    return z * math.sqrt(p * (1 - p) / n)


def cosine(x):
    unit = x / x.norm(dim=1, keepdim=True)
    off = ~torch.eye(len(x), dtype=torch.bool)
    return (unit @ unit.T)[off].mean().item()


# -- made data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "classes"), [("ridge", 2), ("ridge", 5), ("logistic", 2), ("logistic", 3)])
def test_classes_in_a_few_directions_are_found_and_the_controls_are_at_chance(classes, kind):
    n, f, seeds = (300, 40, 3) if kind == "ridge" else (120, 20, 1)
    y = torch.arange(n) % classes
    centres = 3 * rows(classes, f, seed=1) / math.sqrt(f) * 2
    x = rows(n, f) + centres[y] + 3
    found = probe(x, y, kind=kind, dims=f, seeds=seeds)
    assert found.score > 0.95 and 0.9 < found.interval[0] < found.score <= found.interval[1] <= 1
    assert found.chance == pytest.approx(1 / classes) and found.classes == tuple(range(classes))
    for name in ("shuffled", "noise"):
        assert len(found.controls[name]) == seeds
        for value in found.controls[name]:
            assert abs(value - 1 / classes) < binomial(1 / classes, n)
    assert max(found.controls["subspace"]) < found.score - 0.1
    assert found.selectivity == pytest.approx(found.score - sum(found.controls["shuffled"]) / seeds)
    assert (found.scores(x).argmax(1) if classes > 2 else (found.scores(x)[:, 0] > 0).long()).eq(
        y
    ).double().mean() > 0.95
    assert found.weights.shape == (1 if classes == 2 else classes, f) and found.basis.shape == (classes - 1, f)
    torch.testing.assert_close(found.basis @ found.basis.T, torch.eye(classes - 1).double())
    means = torch.stack([x[y == c].mean(0) for c in range(classes)]) - x.mean(0)
    torch.testing.assert_close(found.patterns, means)


def test_a_number_is_found_with_its_slope_and_an_interval():
    n, f = 300, 30
    x = rows(n, f)
    y = 2.0 * x[:, 3] - x[:, 7] + 5 + 0.3 * rows(n, 1, seed=2)[:, 0]
    found = probe(x, y, seeds=3)
    truth = 1 - 0.3**2 / (5 + 0.3**2)
    assert found.classes is None and found.chance == 0 and found.score == pytest.approx(truth, abs=0.02)
    assert found.interval[0] < truth < found.interval[1] < 1 and found.interval[1] - found.interval[0] < 0.03
    want = torch.zeros(f, dtype=torch.float64)
    want[3], want[7] = 2, -1
    torch.testing.assert_close(found.weights[0], want, atol=0.1, rtol=0)
    torch.testing.assert_close(found.scores(x)[:, 0], y, atol=1.2, rtol=0)
    assert all(-0.4 < v < 0.1 for name in ("shuffled", "noise") for v in found.controls[name])
    assert max(found.controls["subspace"]) < 0.35  # about one part in 30
    centred = x - x.mean(0)
    torch.testing.assert_close(found.patterns[0], centred.T @ (y - y.mean()) / (y - y.mean()).square().sum())


def test_r_squared_is_against_the_mean_of_the_training_rows():
    """By hand, from the held-out readings. The mean of all rows knows those held out too, and gives another number."""
    x, y = rows(20, 4), rows(20, 1, seed=2)[:, 0] + torch.arange(20) / 5
    found = probe(x, y, folds=5, seeds=0)
    blind = torch.tensor([float(y[found.fold != fold].mean()) for fold in found.fold], dtype=torch.float64)
    missed = (y - found.predicted).square().sum()
    assert found.score == pytest.approx(float(1 - missed / (y - blind).square().sum()), abs=1e-12)
    assert abs(found.score - float(1 - missed / (y - y.mean()).square().sum())) > 0.01


def test_a_control_that_is_worse_than_the_mean_does_not_count_for_the_probe():
    """With few rows, shuffled numbers are fitted and missed: their R^2 is far below 0, which a constant has."""
    found = probe(rows(60, 40), rows(60, 1, seed=9)[:, 0], seeds=3)
    assert max(found.controls["shuffled"]) < 0 and found.selectivity == found.score
    held = replace(found, controls={"shuffled": (-1.0, 0.2)})
    assert held.selectivity == pytest.approx(found.score - 0.1)


def test_anisotropic_states_need_centring():
    """All rows point the same way to one part in ten thousand; what they say is in the rest."""
    n, f = 400, 60
    y = torch.arange(n) % 2
    x = 100 * rows(1, f, seed=3).abs() + rows(n, f) * 0.01
    x[:, 5] += 0.03 * (2 * y - 1)
    assert cosine(x) > 0.9999
    chance = binomial(0.5, n)
    assert abs(probe(x, y, centre=False, whiten=False, seeds=0).score - 0.5) < chance
    assert probe(x, y, seeds=0).score > 0.98
    stretched = x * torch.logspace(-2, 2, f, dtype=torch.float64)  # scales of coordinates mean nothing
    assert probe(stretched, y, seeds=0).score == probe(x, y, seeds=0).score


def test_a_signal_of_little_variance_needs_whitening_or_enough_components():
    n, f = 400, 30
    y = torch.arange(n) % 2
    mix = torch.linalg.qr(rows(f, f, seed=5))[0]
    scales = torch.logspace(0, -5, f, dtype=torch.float64)
    x = rows(n, f) * scales
    x[:, -1] += 3 * scales[-1] * (2 * y - 1)
    assert probe(x @ mix, y, seeds=0, dims=f, shrinkage=0).score > 0.98
    assert probe(x @ mix, y, seeds=0, dims=f, whiten=False).score < 0.7
    assert probe(x @ mix, y, seeds=0, dims=f // 2).score < 0.7


def test_constant_features_say_nothing():
    y = torch.arange(60) % 3
    for x in (torch.ones(60, 4).double(), torch.zeros(60, 4)):
        found = probe(x, y, seeds=1)
        assert found.score <= found.chance and found.dims == 0 and not found.weights.any()


# -- no leakage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_a_held_out_row_changes_nothing_that_is_said_of_the_others_of_its_fold(kind):
    """Whitening, centring or a penalty fitted on all rows would: the row is replaced by an enormous one."""
    n, f = 60, 90
    y = torch.arange(n) % 3
    x = rows(n, f)
    x[:, :3] += 2 * torch.nn.functional.one_hot(y, 3)
    first = probe(x, y, kind=kind, seeds=0, folds=4)
    numbers = probe(x, x[:, 0] + 0.1 * x[:, 50], seeds=0, folds=4)
    changed = x.clone()
    changed[7] = 1e4 * rows(1, f, seed=8)
    again = probe(changed, y, kind=kind, seeds=0, folds=4)
    again_numbers = probe(changed, x[:, 0] + 0.1 * x[:, 50], seeds=0, folds=4)
    fold = first.fold == first.fold[7]
    fold[7] = False
    assert torch.equal(first.fold, again.fold) and fold.sum() >= 10
    assert torch.equal(first.predicted[fold], again.predicted[fold])
    assert torch.equal(numbers.predicted[fold], again_numbers.predicted[fold])
    assert not torch.equal(numbers.predicted[~fold], again_numbers.predicted[~fold])  # it was trained on there


def test_a_group_is_never_on_both_sides():
    """Rows of a group are the same but for noise, and their labels are coins: split by row, one reads them off."""
    groups = torch.arange(40).repeat_interleave(6)
    coin = torch.randint(2, (40,), generator=torch.Generator().manual_seed(0))
    x = rows(40, 50, seed=1)[groups] + 0.05 * rows(240, 50)
    split = probe(x, coin[groups], groups=groups, seeds=2)
    assert probe(x, coin[groups], seeds=0).score > 0.95
    assert abs(split.score - 0.5) < binomial(0.5, 40) and split.groups == 40
    assert all(abs(v - 0.5) < binomial(0.5, 40) for v in split.controls["shuffled"])  # whole groups are permuted
    mixed = permute(coin[groups], groups, torch.Generator().manual_seed(1)).reshape(40, 6)
    assert (mixed == mixed[:, :1]).all() and mixed.sum() == 6 * coin.sum()
    for g in range(40):
        assert len(split.fold[groups == g].unique()) == 1
    assert sorted(split.fold.bincount().tolist()) == [48] * 5
    low, high = split.interval  # Wilson's with 40, not 240
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(split.score * (1 - split.score) / 40), rel=0.1)


@pytest.mark.parametrize("sizes", [[5] * 20, [40] + [2] * 30, [round(60 / (i + 1)) for i in range(30)]])
def test_an_interval_covers_the_truth_when_groups_differ_in_size(sizes):
    """Rows of a group are right or wrong together; 95 % of the intervals, or more, should hold the true share."""
    rng, how, held = torch.Generator().manual_seed(0), How(2, True, True, 0.0, "ridge", 2), 0
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    y = torch.ones(len(group), dtype=torch.long)
    for _ in range(400):
        guess = (torch.rand(len(sizes), generator=rng) < 0.7).long()[group]
        low, high = interval(y, guess, y, group, how, rng)
        held += low <= 0.7 <= high
    assert held >= 0.92 * 400


def test_copies_of_a_row_are_one_group():
    """Any labels of a few rows can be read off their copies."""
    names = torch.arange(30).repeat(6)
    coin = torch.randint(2, (30,), generator=torch.Generator().manual_seed(0))[names]
    x = rows(30, 50)[names] * torch.where(torch.arange(50) == 3, -0.0, 1.0)  # -0 is 0
    x[::2, 3] = 0.0
    found, apart = probe(x, coin, seeds=0), probe(x, coin, groups=range(180), seeds=0)
    assert apart.score == 1 and apart.groups == 180
    assert abs(found.score - 0.5) < binomial(0.5, 30) and found.groups == 30
    assert found.score == probe(x, coin, groups=names, seeds=0).score


def test_prompts_that_begin_alike_are_one_group_of_a_cell():
    """What the model holds after a prefix is the same in all of them: labels drawn for each prefix can all be read."""
    ids = torch.randint(0, 5, (120, 4), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 7  # where there is no other, the prompts tell nothing of each other
    pair = ids[:, 1] * 5 + ids[:, 2]
    coin = torch.randint(2, (25,), generator=torch.Generator().manual_seed(1))[pair]
    given = {"site": "ssm_state", "layers": 2, "progress": False, "seeds": 1, "folds": 3}
    leaks = probe_grid(MODEL, ids, coin, positions=2, groups=range(120), **given)[0, 0]
    assert leaks.score > 0.9
    grid = probe_grid(MODEL, ids, coin, positions=[0, 2, 3, (2, 3)], **given)
    assert grid.values("groups").tolist() == [[120, 25, len(ids.unique(dim=0)), 25]]
    assert abs(grid[0, 1].score - 0.5) < binomial(0.5, 25) and max(grid[0, 1].controls["shuffled"]) < 0.8
    lengths = torch.tensor([3, 4]).repeat(60)  # each row's own last position: the longer ones' is one further on
    short = len(ids[::2, :3].unique(dim=0)) + len(ids[1::2].unique(dim=0))
    padded = probe_grid(MODEL, ids, coin, positions=[-1, (-1, -2)], lengths=lengths, **given)
    alone = {*pair[1::2].tolist()} - {*pair[::2].tolist()}
    assert padded[0, 0].groups == short and padded[0, 1].groups == 5 + len(alone)  # longer ones through a shorter one


# -- against others ---------------------------------------------------------------------------------------------------


def test_the_pipeline_against_scikit_learn():
    decomposition = pytest.importorskip("sklearn.decomposition")
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    x, y = rows(80, 25) @ rows(25, 25, seed=2), rows(80, 1, seed=3)[:, 0]
    for n in (80, 20):  # more rows than features, and fewer
        how = How(10, True, True, 0.0, "ridge", 0)
        space = Space.fit(x[:n], how)
        pca = decomposition.PCA(10, whiten=True, svd_solver="full")
        theirs = torch.as_tensor(pca.fit_transform(StandardScaler().fit_transform(x[:n].numpy())))
        ours = space(x[:n]) * ((n - 1) / n) ** 0.5
        torch.testing.assert_close(ours.abs(), theirs.abs(), rtol=1e-7, atol=1e-9)
        w, b = fit(space(x[:n]) + 2, y[:n], torch.arange(n), how)
        fits = [Ridge(alpha=p).fit(space(x[:n]).numpy() + 2, y[:n].numpy()) for p in PENALTIES]
        nearest = min(fits, key=lambda r: float(abs(torch.as_tensor(r.coef_) - w[0]).max()))
        torch.testing.assert_close(w[0], torch.as_tensor(nearest.coef_), rtol=1e-8, atol=1e-10)
        assert b.item() == pytest.approx(nearest.intercept_, abs=1e-10)


def test_the_penalty_is_chosen_by_what_it_gives_on_rows_held_out():
    def size(noise):
        z = rows(60, 40)
        y = z[:, 0] + noise * rows(60, 1, seed=4)[:, 0]
        w, _ = fit(z, y, torch.arange(60), How(40, True, True, 0.0, "ridge", 0))
        return w.norm().item()

    z, groups = rows(20, 15).repeat(6, 1) + 0.05 * rows(120, 15, seed=1), torch.arange(20).repeat(6)
    coin = rows(20, 1, seed=2)[:, 0].repeat(6)
    by_group, by_row = (fit(z, coin, g, How(15, True, True, 0.0, "ridge", 0))[0] for g in (groups, torch.arange(120)))
    assert by_group.norm() < 0.5 * by_row.norm()
    assert size(0.0) > 0.95 and size(30.0) < 0.5 * 30 / math.sqrt(60)  # heavy where there is only noise


@pytest.mark.parametrize(
    ("kind", "cycle"),
    [("ridge", [0, 1, 2]), ("ridge", [0.0, 1.0, 2.0]), ("logistic", [0, 1, 2]), ("logistic", [0, 0, 1])],
)
def test_the_order_of_the_rows_does_not_choose_the_penalty(kind, cycle):
    """Conditions in cycles of as many rows as there are inner folds: each fold would hold what the others lack."""
    n, f = 150, 10
    y = torch.tensor(cycle).repeat(n // 3)
    x = rows(n, f)
    x[:, :3] += 3 * torch.nn.functional.one_hot(y.long(), 3)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(5))
    cycles, mixed = (probe(x[i], y[i], kind=kind, seeds=0).weights.norm() for i in (torch.arange(n), order))
    assert 0.9 < cycles / mixed < 1.1


@pytest.mark.parametrize(("n", "f"), [(50, 200), (400, 20)])
def test_the_noise_has_the_mean_and_the_covariance_of_the_features(n, f):
    x = rows(n, f) @ rows(f, f, seed=1) / f**0.5 + 5
    rng = torch.Generator().manual_seed(0)
    drawn = torch.cat([like(x, rng) for _ in range(40)])
    assert (drawn.mean(0) - x.mean(0)).abs().max() < 5 / (40 * n) ** 0.5 * x.std(0).max()
    ours, theirs = drawn.T.cov(), x.T.cov()
    assert (ours - theirs).norm() < 0.15 * theirs.norm()
    assert ours.trace().item() == pytest.approx(theirs.trace().item(), rel=0.03)


# -- on models --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def counter(seed):
    """A model in which one state coordinate (layer, e, n), drawn by the seed, sums the TICKs so far: logit 0 reads it.

    All other coordinates are zero, or the same for all prompts of a length.
    """
    rng = torch.Generator().manual_seed(seed)
    layer, n = int(torch.randint(LAYERS, (1,), generator=rng)), int(torch.randint(N, (1,), generator=rng))
    e, constant = torch.randperm(E, generator=rng)[:2].tolist()
    sizes = {"d_model": D, "n_layer": LAYERS, "vocab_size": 8, "d_state": N, "d_conv": 2, "dt_rank": 1}
    model = Mamba(MambaConfig(**sizes, tie_embeddings=False, norm_eps=1e30)).double()
    for name, p in model.named_parameters():
        p.fill_(1e15 if "norm" in name else math.log(1e-3) if name.endswith("A_log") else 0.0)
        if name.endswith("dt_proj.bias"):
            p.fill_(math.log(math.e - 1))  # softplus gives 1
    model.backbone.embedding.weight[:, 0] = 1.0
    model.backbone.embedding.weight[TICK, 1] = 1.0
    m = model.backbone.layers[layer].mixer
    m.in_proj.weight[e, 1] = m.in_proj.weight[constant, 0] = m.in_proj.weight[E + e, 0] = 4.0
    m.conv1d.weight[:, 0, -1] = 1.0
    m.x_proj.weight[1 + n, constant] = m.x_proj.weight[1 + N + n, constant] = 0.25
    m.out_proj.weight[2, e] = 0.002
    model.lm_head.weight[0, 2] = 1.0
    return model, layer, e, n


def score(logits):
    return logits[:, -1, 0]


def prompts(n, seed, length=9):
    ids = torch.randint(2, 6, (n, length), generator=torch.Generator().manual_seed(seed))
    ids[:, -1] = 5
    return ids


@pytest.mark.parametrize("seed", range(3))
def test_the_planted_count_is_found_in_its_layer_and_the_probe_is_causal(seed):
    """The direction is the planted coordinate; without it the model does not count; one unit on, it counts on."""
    model, layer, e, n = counter(seed)
    ids = prompts(120, seed)
    count = (ids == TICK).cumsum(1)
    grid = probe_grid(model, ids, count.double(), site="ssm_state", positions=[3, -1], progress=False)
    assert grid.layers == (0, 1) and grid.positions == (3, -1)
    assert grid.values()[layer].min() > 0.999 and grid.values()[1 - layer].abs().max() < 0.1  # empty: the mean
    for control in ("shuffled", "noise"):
        assert grid.values(control)[layer].max() < 0.1
    found = grid[layer, 1]
    assert found.basis.shape == (1, 8, 6) and found.patterns.shape == (1, 8, 6)
    assert found.basis.abs()[0, e, n] == pytest.approx(1, abs=1e-9)
    place = at.ssm_state(layer=layer, pos=-1)
    with torch.no_grad():
        clean, out = (score(run(model, ids, edits).logits) for edits in ([], [Project(place, found.basis)]))
        assert clean.std() > 0.03 and out.std() < 1e-9
        more = score(run(model, ids, Add(place, found.towards(1.0))).logits)
        ticks = ids.clone()
        ticks[:, 0], ids[:, 0] = TICK, 5
        one = score(run(model, ticks).logits) - score(run(model, ids).logits)
    torch.testing.assert_close(more - clean, one.mean().expand(120), rtol=0.02, atol=1e-3)


def test_the_planted_count_as_classes_over_several_positions_at_once():
    model, layer, *_ = counter(1)
    ids = prompts(100, 3, length=5)
    labels = ((ids == TICK).cumsum(1) > 0).long()
    labels[:, 0] = -1  # no label there
    columns = [(1, 2, 3), (0, 1)]
    grid = probe_grid(model, ids, labels, site="ssm_state", positions=columns, layers=layer, progress=False)
    assert grid.positions == ((1, 2, 3), (0, 1)) and grid[0, 0].rows == 300
    assert grid[0, 0].groups == grid[0, 1].groups == 16 == len(ids[:, :2].unique(dim=0))
    assert grid[0, 1].rows == 100
    fold = grid[0, 0].fold.reshape(3, 100)
    assert (fold == fold[0]).all()  # a prompt's rows stay together
    alone = probe_grid(model, ids, labels[:, 1], site="ssm_state", positions=1, layers=[layer], progress=False)
    assert alone[0, 0].score == grid[0, 1].score > 0.95 and grid[0, 0].score > 0.9


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["accumulator", "two", "latch", "recall", "delay"])
def test_what_a_circuit_holds_is_found_among_distractors(name, seed):
    """Of a sum its size, of pairs what is bound to one key, of a delay line the symbol that comes out at the end."""
    model = plant(name, seed)
    ids, rows = model.sample(200, seed), torch.arange(200)
    site, layer, y = "ssm_state", model.truth.layer, model.answer(ids)
    if name == "recall":
        key = ids[:, -1].min()
        y = ids[rows, (ids[:, :-1] == key).long().argmax(1) + 1]
    elif name == "delay":
        hop = next(flow for flow in model.truth.flows if flow.target == 11)
        source = next(flow for flow in model.truth.flows if flow.target == hop.source).source
        site, layer = "mixer_out", hop.layer
        symbols = model.ids[:, source]
        y = torch.where((ids[:, source, None] == symbols).any(1), ids[:, source], -1)
    grid = probe_grid(model.model, ids, y, site=site, layers=layer, positions=-1, progress=False, seeds=2)
    found = grid[0, 0]
    assert found.score > 0.9
    for value in found.controls["shuffled"] + found.controls["noise"]:
        assert value < (0.15 if found.classes is None else found.chance + binomial(found.chance, found.rows))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_collecting_is_recording(backend):
    ids = torch.randint(0, 29, (7, 6), generator=torch.Generator().manual_seed(0))
    places = [at.ssm_state(layer=1, pos=-1), at.u(pos=[0, 2]), at.embed(), at.recurrent_state(layer=[2, 0], pos=1)]
    whole = run(MODEL, ids, record=places, backend=backend)
    for batch in (1, 3, 64):
        found = collect(MODEL, ids, places, batch=batch, backend=backend)
        for place in places:
            torch.testing.assert_close(found[place], whole[place].detach(), rtol=1e-12, atol=1e-13)
            assert not found[place].requires_grad
    lengths = [6, 2, 3, 6, 5, 4, 3]
    place = at.ssm_state(layer=1, pos=-2)
    padded = collect(MODEL, ids, place, batch=2, lengths=lengths)[place]
    for i, size in enumerate(lengths):
        alone = run(MODEL, ids[i : i + 1, :size], record=place)[place].detach()
        torch.testing.assert_close(padded[i : i + 1], alone, rtol=1e-12, atol=1e-13)


def test_a_grid_is_probes_of_recordings():
    ids = torch.randint(0, 29, (40, 4), generator=torch.Generator().manual_seed(0))
    lengths = torch.randint(2, 5, (40,), generator=torch.Generator().manual_seed(1))
    other = tiny(seed=10)
    at_end = ids[torch.arange(40), lengths - 2] % 2
    labels = ids % 2
    grid = probe_grid(
        MODEL, ids, labels, site="y", layers=[2], positions=[-2], lengths=lengths, random_model=other, batch=16,
        progress=False, seeds=1, folds=3,
    )  # fmt: skip
    place = at.y(layer=2, pos=-2)
    x, x_other = (run(m, ids, record=place, lengths=lengths)[place] for m in (MODEL, other))
    one = probe(x, at_end, other=x_other, seeds=1, folds=3)
    assert grid[0, 0].score == one.score and grid[0, 0].controls == one.controls and "random" in one.controls
    assert grid.values("random")[0, 0] == one.controls["random"][0] and grid.values("low")[0, 0] == one.interval[0]
    embed = probe_grid(MODEL, ids, labels, site="embed", positions=slice(1, 3), progress=False, seeds=0)
    assert embed.layers == (None,) and embed.positions == (1, 2) and embed.values().shape == (1, 2)
    assert probe_grid(MODEL, ids, labels, site="x", layers=0, progress=False, seeds=0).positions == (0, 1, 2, 3)


@pytest.mark.parametrize(("room", "passes"), [(1 << 30, 1), (2 * 40 * 4 * 24 * 8, 2), (1, 3)])
def test_one_pass_records_as_many_layers_as_there_is_room_for(monkeypatch, room, passes):
    """y of 40 prompts at 4 positions, in 24 channels of 8 bytes."""
    ids = torch.randint(0, 29, (40, 4), generator=torch.Generator().manual_seed(0))
    alone = [probe_grid(MODEL, ids, ids[:, 0] % 2, site="y", layers=i, progress=False, seeds=0) for i in range(3)]
    module, runs = importlib.import_module("interp.probes"), []
    monkeypatch.setattr(module, "MEMORY", room)
    monkeypatch.setattr(module, "run", lambda *args, **options: runs.append(1) or run(*args, **options))
    grid = probe_grid(MODEL, ids, ids[:, 0] % 2, site="y", progress=False, seeds=0)
    assert len(runs) == passes and grid.layers == (0, 1, 2)
    assert [row.tolist() for row in grid.values()] == [one.values()[0].tolist() for one in alone]


def test_strings_and_bools_are_classes():
    x = rows(60, 5)
    said = ["high" if v > 0 else "low" for v in x[:, 0]]
    found = probe(x, said, seeds=0)
    assert found.classes == ("high", "low") and found.score > 0.9
    assert probe(x, x[:, 0] > 0, seeds=0).score == found.score
    assert probe(x.float().requires_grad_(), (x[:, 0] > 0).numpy(), seeds=0).score == found.score
    assert (found.scores(x)[:, 0] > 0).tolist() == [s > 0 for s in (-found.scores(x)[:, 0]).neg().tolist()]


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
@pytest.mark.parametrize("of", [np.float32, np.float64, torch.tensor])
def test_numbers_in_any_wrapping_are_numbers(of, kind):
    """A scalar of numpy or torch in a list is no class of its own, and no group of its own."""
    x = rows(60, 5)
    found = probe(x, x[:, 0].float().tolist(), groups=[i // 4 for i in range(60)], seeds=0)
    y = kind([of(v) for v in x[:, 0].float().tolist()])
    wrapped = probe(x, y, groups=kind([of(float(i // 4)) for i in range(60)]), seeds=0)
    assert wrapped.classes is None and wrapped.groups == 15 and wrapped.score == pytest.approx(found.score)
    again = probe(x.numpy(), y, groups=[i // 4 for i in range(60)], seeds=0, folds=np.int64(5), dims=torch.tensor(64))
    assert again.score == wrapped.score and torch.equal(found.scores(x.numpy()), found.scores(x))
    assert probe(x, [torch.tensor(i % 2) for i in range(60)], seeds=0).classes == (0, 1)


def test_a_class_that_a_training_fold_lacks():
    x, y = rows(40, 4), torch.arange(40) % 3
    y[y == 2] = 0
    y[5] = 2
    x[:, 0] += 5 * y
    for kind in ("ridge", "logistic"):
        found = probe(x, y, kind=kind, seeds=0)
        assert found.predicted[5] != 2 and found.score > 0.8


# -- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_be_probed_raises(monkeypatch):
    x, y = rows(20, 3), torch.arange(20) % 2
    bad = {
        "3 labels for 20 rows": lambda: probe(x, y[:3]),
        "a probe needs two classes": lambda: probe(x, y * 0),
        "do not vary": lambda: probe(x, torch.ones(20)),
        "without NaN": lambda: probe(x / 0 * 0, y),
        "3 groups for 20 rows": lambda: probe(x, y, groups=[1, 2, 3]),
        "folds=5: from 2 to the number of groups, 4": lambda: probe(x, y, groups=[i % 4 for i in range(20)]),
        "folds=1": lambda: probe(x, y, folds=1),
        "dims=0": lambda: probe(x, y, dims=0),
        "shrinkage=2": lambda: probe(x, y, shrinkage=2),
        "kind='lasso'": lambda: probe(x, y, kind="lasso"),
        "labels are numbers": lambda: probe(x, y.double(), kind="logistic"),
        "other has 3 rows": lambda: probe(x, y, other=x[:3]),
        "folds=5.0, dims=64": lambda: probe(x, y, folds=5.0),
        "dims=5.0": lambda: probe(x, y, dims=5.0),
        "seeds=-1: so many of each": lambda: probe(x, y, seeds=-1),
        "None is no label": lambda: probe(x, [None, 1] * 10),
        "no tensor or array": lambda: probe([["a"], ["b"]] * 10, y),
        "the labels mix strings with numbers": lambda: probe(x, [1.0, "b"] * 10),
        "groups for 20 rows: give one each": lambda: probe(x, y, groups=[[1]] * 20),
        "made with seeds=0": lambda: probe(x, y, seeds=0).selectivity,
    }
    for text, call in bad.items():
        with pytest.raises(InputError, match=text):
            call()
    twice = {"ids": IDS.repeat(10, 1), "labels": IDS.repeat(10, 1), "site": "u", "layers": 0, "positions": [1]}
    with pytest.raises(
        InputError,
        match=r"u\(layer=0, pos=1\): folds=5: from 2 to the number of groups, 2\. Where `groups` is left out",
    ):
        probe_grid(MODEL, **twice, groups=[0, 1] * 10, progress=False)
    assert probe_grid(MODEL, **twice, progress=False)[0, 0].score == 0  # of two prompts each is a fold, and a class
    for label, text in (
        (-2, "hold -2: .* -1 says"),
        (-1, r"pos=1\): all labels are \(1,\).* label is -1 or NaN are left"),
    ):
        twice["labels"] = torch.tensor([label, 1] * 10)
        with pytest.raises(InputError, match=text):
            probe_grid(MODEL, **twice, progress=False)
    twice["labels"] = IDS.repeat(10, 1)
    grid = probe_grid(MODEL, **twice, groups=range(20), progress=False, seeds=0)
    with pytest.raises(InputError, match=r"no values 'scor'\. Did you mean 'score'"):
        grid.values("scor")
    with pytest.raises(EditError, match=r"site='ssm_stat' is no site\. Did you mean 'ssm_state'"):
        probe_grid(MODEL, IDS, [0, 1], site="ssm_stat")
    with pytest.raises(EditError, match="no part of a layer"):
        probe_grid(MODEL, IDS, [0, 1], site="embed", layers=1)
    with pytest.raises(AddressError, match=r"indices 0\.\.5"):
        probe_grid(MODEL, IDS, [0, 1], site="u", positions=[6])
    with pytest.raises(AddressError, match="name the positions"):
        probe_grid(MODEL, IDS, [0, 1], site="u", lengths=[6, 4])
    with pytest.raises(InputError, match=r"labels \(2, 3\)"):
        probe_grid(MODEL, IDS, torch.ones(2, 3), site="u", positions=[1], progress=False)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(MissingExtra, match=r"mambascope\[probes\]"):
        probe(x, y, kind="logistic")
    assert isinstance(MissingExtra("x"), ImportError) and probe(x, y).rows == 20


def test_to_remove_what_a_probe_reads_is_not_to_erase_what_it_is_of():
    """Correlated noise turns the weights away from the means' difference; only without that are the classes one."""
    rng = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (1200,), generator=rng)
    mix = torch.randn(6, 6, generator=rng, dtype=torch.float64)
    centres = 3 * torch.randn(3, 6, generator=rng, dtype=torch.float64)
    x = centres[y] + torch.randn(1200, 6, generator=rng, dtype=torch.float64) @ mix

    def without(basis):
        q = torch.linalg.qr(basis.T)[0]
        return x - x @ q @ q.T

    found = probe(x, y, seeds=0)
    assert found.score > 0.8
    assert probe(without(found.basis), y, seeds=0).score > found.chance + 0.1
    assert probe(without(found.patterns[1:]), y, seeds=0).score < found.chance + 0.03


def test_what_brings_a_class_about_comes_from_the_class_that_is_left():
    """patterns[c] alone is from the mean of all rows: between two classes that is halfway, at the boundary."""
    for classes in (2, 3):
        y = torch.arange(600) % classes
        x = rows(600, 10) + 6 * torch.nn.functional.one_hot(y, 10)
        found = probe(x, ["abc"[i] for i in y], seeds=0)
        a, b = x[y == 0], x[y == 1]

        def read_as_b(x, probe=found):
            scores = probe.scores(x)
            return (scores.argmax(1) if probe.weights.shape[0] > 1 else (scores[:, 0] > 0).long()).eq(1).double().mean()

        assert read_as_b(a) < 0.01 and read_as_b(a + found.patterns[1]) < 0.8
        assert read_as_b(a + found.towards("b", frm="a")) > 0.99
        torch.testing.assert_close((a + found.towards("b", frm="a")).mean(0), b.mean(0))
        for wrong in ({"to": "d", "frm": "a"}, {"to": "b", "frm": 0}, *([{"to": "b"}] if classes == 3 else [])):
            with pytest.raises(InputError, match="name two of the classes"):
                found.towards(**wrong)
    two = probe(rows(60, 3), torch.arange(60) % 2 == 0, seeds=0)
    assert torch.equal(two.towards(True), two.towards(True, frm=False))


def test_one_unit_of_a_number_moves_the_reading_by_one():
    """Half of the variance is noise: the patterns, which are of the rows, move it by R^2."""
    x = rows(2000, 10)
    y = x[:, 3] + rows(2000, 1, seed=2)[:, 0]
    found = probe(x.reshape(2000, 5, 2), y, seeds=0)

    def moved(by):
        return found.scores(x.reshape(2000, 5, 2) + by) - found.scores(x.reshape(2000, 5, 2))

    assert found.towards(1.0).shape == (5, 2)
    torch.testing.assert_close(moved(found.towards(1.0)), torch.ones(2000, 1).double())
    torch.testing.assert_close(moved(found.towards(2, frm=4.5)), torch.full((2000, 1), -2.5).double())
    torch.testing.assert_close(moved(found.patterns[0]), torch.full((2000, 1), found.score).double(), atol=0.01, rtol=0)
    with pytest.raises(InputError, match="no direction"):
        probe(torch.ones(60, 3), rows(60, 1)[:, 0], seeds=0).towards(1.0)


def test_what_is_collected_does_not_depend_on_the_batch():
    """Also of slices that rows of unequal lengths have in part, with steps from either end."""
    model = tiny()
    ids = torch.randint(0, 29, (5, 6), generator=torch.Generator().manual_seed(0))
    places = [
        at.ssm_state(layer=[0, 2], pos=slice(-4, None, 2)), at.embed(pos=slice(-4, None, 2), d=0), at.x(layer=1),
        at.u(layer=0, pos=slice(1, None, 2)), at.z(layer=slice(None), pos=-1), at.embed(pos=[0, -1]),
    ]  # fmt: skip
    for lengths in (None, [4, 4, 3, 3, 2]):
        want = run(model, ids, record=places, lengths=lengths)
        for batch in (1, 2, 3):
            found = collect(model, ids, places, batch=batch, lengths=lengths)
            for place in places:
                torch.testing.assert_close(found[place], want[place], equal_nan=True)


def test_a_column_of_few_beginnings_has_as_many_folds_as_beginnings():
    """Of the first token there are three; the grid's other columns are probed all the same."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 29, (60, 4), generator=rng)
    ids[:, 0] = torch.arange(60) % 3
    grid = probe_grid(tiny(), ids, ids[:, 1] % 2, site="resid_post", seeds=0, progress=False)
    assert grid.values("groups")[:, 0].tolist() == [3.0] * len(grid.layers)
    assert int(grid[0, 0].fold.max()) == 2 and int(grid[0, 3].fold.max()) == 4


def test_copies_from_batches_of_another_size_are_copies():
    """Which can differ in the last digits."""
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = alike(torch.cat([x, x * (1 + 1e-9)]))
    assert sum(a == b for a, b in zip(found[:20], found[20:], strict=True)) >= 19 and len(set(found[:20])) == 20


def test_prompts_with_one_beginning_are_grouped_in_no_time():
    ids = torch.randint(0, 29, (6000, 6), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 1
    begin = time.process_time()
    groups = same_so_far(ids, torch.tensor([[0], [5]]).expand(2, 6000))
    assert len(set(groups)) == 1 and time.process_time() - begin < 1.0


def test_rows_are_projected_once_a_fold_and_not_for_each_set_of_labels(monkeypatch):
    """24,576 features of 300 rows took half as long again."""
    real, rows = Space.__call__, []
    monkeypatch.setattr(Space, "__call__", lambda space, x: (rows.append(len(x)), real(space, x))[1])
    probe(torch.randn(20, 30), torch.arange(20) % 2, folds=4, seeds=2)
    assert rows == [20] * (4 * (1 + 2) + 1)  # the rows and each seed's noise by fold, and the whole fit

"""Every cell of a sweep is the whole run that one would do by hand, through this library and through another."""

import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny

from interp import (
    Add,
    Apply,
    Mean,
    Project,
    Scale,
    Set,
    Zero,
    at,
    edges,
    knockout_grid,
    logit_diff,
    patch_grid,
    path_patch,
    run,
    sweep,
)
from interp.logits import Logits
from interp.run import MetricError
from interp.sweep import batch
from interp.sweep.base import SCANNED, Scanned
from kernels_bridge import BACKENDS
from minimal_mamba import Mamba
from minimal_mamba.block import Mixer
from minimal_mamba.errors import AddressError, EditError, InputError, MambascopeError
from minimal_mamba.sites import ADDRESSABLE

_spec = importlib.util.spec_from_file_location("oracle", Path(__file__).parent / "test_oracle.py")
oracle = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracle)
B, draw = oracle.B, oracle.draw

HERE = [name for name in ("reference", "torch", "compiled") if not BACKENDS[name].missing(torch.device("cpu"))]
EACH = pytest.mark.parametrize("backend", HERE)
MODEL = tiny(seed=2)
N, L = MODEL.config.n_layer, 8
RNG = torch.Generator().manual_seed(0)
IDS, DONOR = (torch.randint(0, 29, (B, L), generator=RNG) for _ in range(2))


def score(logits):
    return logit_diff(logits, 3, 5)


def everywhere(logits):
    return logits.tanh().mean((1, 2)) + logits[:, 0, 3]


BY_NAME = {"score": score, "everywhere": everywhere}


@torch.no_grad()
def by_hand(cells, metric, lengths=None, backend="torch", model=MODEL, ids=IDS):
    last, rows = lengths is not None, []
    for cell in cells:
        out = run(model, ids, cell, lengths=lengths, backend=backend, last_only=last)
        rows.append(torch.stack([fn(out.logits) for fn in (metric.values() if isinstance(metric, dict) else [metric])]))
    found = torch.stack(rows, 1)  # (metrics, cells, b)
    return found if isinstance(metric, dict) else found[0]


def close(one, two):
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def one_of_each(lengths):
    """A cell for every site, layer and some positions, each with its donor's value."""
    places = [
        getattr(at, site)(pos=pos, **({"layer": layer} if ADDRESSABLE[site].layered else {}))
        for site in ADDRESSABLE for layer in (range(N) if ADDRESSABLE[site].layered else [0]) for pos in (0, -2)
    ]  # fmt: skip
    with torch.no_grad():
        donor = run(MODEL, DONOR, record=places, lengths=lengths)
    return [[Set(a, donor[a])] for a in places]


@EACH
@pytest.mark.parametrize("lengths", [None, [8, 3, 7, 4]])
def test_every_site_layer_and_position(backend, lengths):
    cells = one_of_each(lengths)
    found = sweep(MODEL, IDS, cells, BY_NAME, lengths=lengths, backend=backend, progress=False)
    for name, want in zip(BY_NAME, by_hand(cells, BY_NAME, lengths, backend), strict=True):
        close(found[name].values, want)
    base = by_hand([[]], score, lengths, backend)[0]
    close(found["score"].base, base)
    assert ((found["score"].values - base).abs().amax(1) > 1e-3).sum() > 0.75 * len(cells)  # they do something


@pytest.mark.parametrize("first", range(0, 30, 10))
def test_random_cells_of_several_edits(first):
    """The oracle's edits of every kind, with rows, slices, lists and padding, as the cells of one sweep."""
    drawn = [draw(seed) for seed in range(60) if draw(seed)[0] == draw(first)[0] or len(set(draw(seed)[0])) == 1]
    sizes = drawn[0][0]
    cells = [edits for lengths, _, edits, *_ in drawn if lengths == sizes]
    for lengths in {tuple(sizes), (L,) * B}:
        mine = cells if list(lengths) == sizes else [e for s, _, e, *_ in drawn if s == [L] * B]
        lengths = list(lengths)
        found = sweep(MODEL, IDS, [*mine, []], score, lengths=lengths, progress=False)
        close(found.values, by_hand([*mine, []], score, lengths))


def test_edits_that_would_see_other_rows_run_alone():
    a, b = at.u(layer=1, pos=2), at.ssm_state(layer=0, pos=3)
    cells = [[Mean(a)], [Mean(a, rows=[0, 2])], [Mean(b), Zero(a)], [Mean(a, torch.tensor(0.5))], [Zero(a)]]
    found = sweep(MODEL, IDS, cells, score, progress=False)
    close(found.values, by_hand(cells, score))
    assert (0,) in found.groups and (1,) in found.groups and (2,) in found.groups and len(found.groups) == 4


def test_order_in_a_cell_counts_and_cells_do_not_meet():
    a, b = at.u(layer=1, pos=2, e=[1, 2]), at.u(layer=1, pos=2, e=[2, 3])
    basis = torch.randn(1, 24, generator=RNG, dtype=torch.float64)
    cells = [
        [Add(a, 1.0), Scale(b, 2.0)], [Scale(b, 2.0), Add(a, 1.0)], [Add(a, 1.0)], [Scale(b, 2.0)], [],
        [Project(at.u(layer=1, pos=2), basis), Add(a, 1.0, rows=[1])], [Apply(at.u(layer=1), torch.relu), Add(b, 3.0)],
    ]  # fmt: skip
    found = sweep(MODEL, IDS, cells, score, progress=False)
    close(found.values, by_hand(cells, score))
    assert (found.values[0] - found.values[1]).abs().max() > 1e-4
    assert torch.equal(found.values[4], found.base)
    turned = sweep(MODEL, IDS, cells[::-1], score, progress=False)
    close(turned.values.flip(0), found.values)


@pytest.mark.parametrize("length", [1, 2, 7, 63])
def test_lengths(length):
    ids = torch.randint(0, 29, (2, length), generator=RNG)
    cells = [[Scale(getattr(at, s)(layer=i, pos=p), 1.5)] for s in ("ssm_state", "resid_post", "conv_state")
             for i in range(N) for p in {0, length // 2, length - 1}]  # fmt: skip
    close(sweep(MODEL, ids, cells, score, progress=False).values, by_hand(cells, score, ids=ids))


def test_types_and_norms():
    for kind in ({"dtype": torch.float32}, {"dtype": torch.bfloat16}, {"residual_in_fp32": False}, {"bias": True}):
        model = tiny(seed=3, **kind)
        cells = [[Scale(at.ssm_state(layer=i, pos=p), 0.0)] for i in range(N) for p in range(L)]
        want = by_hand(cells, score, model=model).double()
        found = sweep(model, IDS, cells, score, progress=False).values.double()
        bound = {torch.float32: 1e-5, torch.bfloat16: 0.1}.get(kind.get("dtype"), 1e-10)
        assert (found - want).abs().max() <= bound * want.abs().max()


@pytest.mark.parametrize(("site", "share"), [("ssm_state", 6 / 32), ("resid_post", 3 / 32)])
def test_nothing_is_computed_twice(site, share, monkeypatch):
    """Tokens times layers of a whole grid, counted at the mixers: what follows a cell's layer and position."""
    done = 0
    plain = Mixer.forward

    def counted(self, x, *rest):
        nonlocal done
        done += x.shape[0] * x.shape[1]
        return plain(self, x, *rest)

    monkeypatch.setattr(Mixer, "forward", counted)
    model, ids = tiny(n_layer=4, d_model=4), torch.randint(0, 29, (2, 48), generator=RNG)
    cells = [[Zero(getattr(at, site)(layer=i, pos=p))] for i in range(4) for p in range(48)]
    sweep(model, ids, cells, lambda logits: logits[:, -1, 3], progress=False)
    naive = 2 * 48 * 4 * len(cells)
    assert share * naive < done < 1.4 * share * naive  # half the positions, times the layers behind the cell's own


def test_logits_are_made_when_a_metric_asks_for_them():
    made = []
    whole = torch.randn(2, 5, 7, generator=RNG)

    def make():
        made.append(1)
        return whole

    lazy = Logits(whole[:, -1], 5, make)
    assert isinstance(lazy, torch.Tensor) and lazy.shape == (2, 5, 7) and lazy.dtype == whole.dtype
    assert torch.equal(lazy[:, -1], whole[:, -1]) and torch.equal(lazy[:, 4], whole[:, 4])
    assert torch.equal(lazy[:, -1, 3], whole[:, -1, 3]) and torch.equal(lazy[:, -1, :4], whole[:, -1, :4])
    assert torch.equal(logit_diff(lazy, 3, 5), logit_diff(whole, 3, 5)) and not made
    ways = [
        lambda x: x[:, 1], lambda x: x[0, -1], lambda x: x[:, -2], lambda x: x[..., -1], lambda x: x.mean((1, 2)),
        lambda x: x[:, torch.tensor(-1)], lambda x: x[torch.tensor([0]), -1], lambda x: x.softmax(-1)[:, -1],
        lambda x: torch.stack([x, x]), lambda x: x + whole, lambda x: whole - x, lambda x: x.argmax(-1), torch.clone,
        lambda x: torch.einsum("blv,blv->b", x, x), lambda x: x[x > 0],
        lambda x: x[np.arange(2), -1],
    ]  # fmt: skip
    for way in ways:
        found = way(lazy := Logits(whole[:, -1], 5, make))
        torch.testing.assert_close(found, way(whole), rtol=0, atol=0)
        assert type(found) is torch.Tensor and made == [1] and way(lazy) is not None and made == [1]
        made.clear()
    assert lazy.tolist() == whole.tolist()


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float16])
def test_a_metric_of_any_real_type_has_differences_and_means(kind):
    """Of bytes 0 - 1 would be 255; of bools there is no difference, of ints no mean, of 16 bits no quantile."""

    def right(logits):
        return (logits[:, -1, 4] > logits[:, -1, 1]).float()

    def typed(logits):
        return right(logits).to(kind)

    one, two = (patch_grid(MODEL, IDS, DONOR, site="resid_post", metric=f, progress=False) for f in (typed, right))
    assert two.base.tolist() == [1, 0, 1, 0] and two.donor.tolist() == [0, 1, 0, 0] and two.effect().min() == -1
    ways = [lambda g: g.effect(), lambda g: g.recovered(), lambda g: g.recovered_error(), lambda g: g.interval()]
    for way in ways:
        torch.testing.assert_close(way(one), way(two), rtol=0, atol=0, equal_nan=True)
    one, two = (knockout_grid(MODEL, IDS, f, progress=False).error() for f in (typed, right))
    assert torch.equal(one, two)
    one, two = (path_patch(MODEL, IDS, DONOR, edges(MODEL.config, L)[:5], f, progress=False) for f in (typed, right))
    assert torch.equal(one.size(), two.size()) and torch.equal(one.towards(), two.towards())
    with pytest.raises(MetricError, match="real numbers"):
        sweep(MODEL, IDS, [], lambda logits: logits[:, -1, 3] + 0j, progress=False)


def masks(logits):
    logits[..., 29:] = -torch.inf
    return logits[:, -1].log_softmax(-1)[:, 3]


def halves(logits):
    return logits.div_(2)[:, -1, 3]


def moves_the_last(logits):
    last = logits[:, -1]
    last -= 1
    return last[:, 3]


@pytest.mark.parametrize("lengths", [None, [L, L - 1, L, 3]])
@pytest.mark.parametrize("metric", [masks, halves, moves_the_last])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_metric_that_changes_its_logits_is_refused(metric, lengths, mode):
    """What other cells and metrics see would change with them, or nothing at all."""
    cells, how = [[Zero(at.u(layer=0, pos=2))]], {"lengths": lengths, "progress": False}
    ways = [
        lambda fn: sweep(MODEL, IDS, cells, fn, **how).values[0],
        lambda fn: knockout_grid(MODEL, IDS, fn, **how, sources=[2], layers=[0]).base,
    ]
    with mode():
        for way in ways:
            with pytest.raises(MetricError, match=r"logits = logits.clone\(\)"):
                way(metric)
        out = [run(MODEL, IDS, cell, lengths=lengths, last_only=lengths is not None).logits for cell in (cells[0], [])]
        for way, logits in zip(ways, out, strict=True):
            close(way(lambda x: metric(x.clone())), metric(logits.clone()))


def test_a_metric_of_the_last_logits_makes_no_others(monkeypatch):
    """Neither of a cell nor of the base run, in a sweep and in a grid of knockouts."""
    heads, head = [], Mamba.head

    def counted(self, resid, *more, **named):
        last_only = more[2] if len(more) > 2 else named.get("last_only", False)
        heads.append(resid.shape[1] > 1 and not last_only)
        return head(self, resid, *more, **named)

    monkeypatch.setattr(Mamba, "head", counted)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            sweep(MODEL, IDS, [[Zero(at.ssm_state(layer=0, pos=3))]], score, progress=False)
            knockout_grid(MODEL, IDS, score, sources=[2], layers=[0], progress=False)
    assert heads and not any(heads)


def test_a_metric_that_reads_all_logits_needs_no_further_runs(monkeypatch):
    cells = [[Zero(at.ssm_state(layer=i, pos=3))] for i in range(N)]
    monkeypatch.setattr(batch, "run", None)
    assert sweep(MODEL, IDS, cells, everywhere, progress=False).values.shape == (N, B)


def test_metrics_that_read_all_logits_only_of_some_runs():
    """What a metric reads of the base run decides what is made; one that then reads more gets it all the same."""
    cells = [[Scale(getattr(at, s)(layer=i, pos=p), 1.5)] for s in ("ssm_state", "x", "resid_post")
             for i in range(N) for p in (0, 5)]  # fmt: skip
    base = by_hand([[]], score)[0]

    def fickle(logits):
        own = score(logits)
        return own if torch.allclose(own, base, atol=1e-9) else own + logits[:, 6, 1] + logits[:, 0, 2]

    close(sweep(MODEL, IDS, cells, fickle, progress=False).values, by_hand(cells, fickle))


@EACH
def test_edits_of_many_positions_and_layers(backend):
    """Those that start in a layer and go on in it, later and in the ones above."""
    cells = [
        [Scale(at.x(layer=0, pos=1), 1.5), Scale(at.u(layer=0, pos=5), 0.5), Zero(at.ssm_state(layer=2, pos=3))],
        [Scale(at.conv_state(layer=1, pos=[0, 4]), 2.0)], [Scale(at.u(layer=slice(1, 3), pos=slice(2, 6)), 1.3)],
        [Add(at.resid_post(layer=0, pos=2), 1.0), Add(at.resid_post(layer=1, pos=6), 1.0), Zero(at.z(layer=1, pos=4))],
        [Scale(at.ssm_state(layer=2, pos=1), 3.0), Scale(at.gate(layer=2, pos=5), 2.0)], [Scale(at.dt(), 1.1)],
        [Scale(at.resid_pre(layer=2, pos=3), 1.2), Scale(at.y(layer=2, pos=7), 1.2)], [Add(at.embed(pos=2), 0.5)],
        [Zero(at.state_read(layer=2, pos=-1)), Scale(at.resid_post(layer=2, pos=-1), 2.0)], [Scale(at.logits(), 2.0)],
    ]  # fmt: skip
    for lengths in (None, [8, 8, 8, 8]):
        found = sweep(MODEL, IDS, cells, score, lengths=lengths, backend=backend, progress=False)
        close(found.values, by_hand(cells, score, lengths, backend))


def test_errors():
    good = [[Zero(at.u(layer=0, pos=0))]]
    ran = []

    def metric(logits):
        ran.append(1)
        return score(logits)

    with pytest.raises(AddressError, match=r"there are indices 0\.\.2"):  # before anything runs
        sweep(MODEL, IDS, [*good, [Zero(at.u(layer=3))]], metric, progress=False)
    with pytest.raises(EditError, match="neither an edit nor an address"):
        sweep(MODEL, IDS, [["u"]], metric, progress=False)
    assert not ran
    with pytest.raises(MambascopeError, match=r"one number a row; this one gave \(4, 32\)"):
        sweep(MODEL, IDS, good, lambda logits: logits[:, -1], progress=False)
    with pytest.raises(InputError, match="no metric is given"):
        sweep(MODEL, IDS, good, {}, progress=False)
    assert sweep(MODEL, IDS, [], score, progress=False).values.shape == (0, B)
    with pytest.raises(InputError, match=r"memory=1000 bytes is too little .* memory=(\d+) or more") as raised:
        sweep(MODEL, IDS, good, score, memory=1000, progress=False)
    least = int(str(raised.value).split("memory=")[-1].split()[0])
    sweep(MODEL, IDS, good, score, memory=least, progress=False)
    with pytest.raises(InputError, match="too little"):
        sweep(MODEL, IDS, good, score, memory=least - 1, progress=False)


def test_memory_decides_the_groups_and_not_the_numbers():
    cells = [[Zero(at.ssm_state(layer=i, pos=p))] for i in range(N) for p in range(L)]
    random.Random(0).shuffle(cells)
    wide = sweep(MODEL, IDS, cells, score, progress=False)
    with pytest.raises(InputError) as raised:
        sweep(MODEL, IDS, cells, score, memory=1, progress=False)
    least = int(str(raised.value).split("memory=")[-1].split()[0])
    tight = sweep(MODEL, IDS, cells, score, memory=least, progress=False)
    assert len(tight.groups) > 2 * len(wide.groups)
    assert sorted(c for group in tight.groups for c in group) == list(range(len(cells)))
    close(tight.values, wide.values)


@EACH
@pytest.mark.parametrize(
    "cells",
    [
        [[Scale(at.x(layer=N - 1, pos=2), 0.3, rows=[0])]],
        [[Scale(at.ssm_state(layer=N - 1, pos=slice(3, 7)), 0.3)], [Scale(at.ssm_state(layer=N - 1, pos=5), 0.3)]],
        [[Scale(at.u(layer=N - 1, pos=[1, 3]), 0.3, rows=[1])]],
    ],
    ids=["a row untouched", "spans of their own", "two places"],
)
def test_the_last_layer_where_some_rows_are_at_their_end_before_others(backend, cells):
    """What runs whole there is as long as the longest asks; of the others it would end beyond the last position."""

    def last(logits):
        return logits[:, -1, 3]

    got = sweep(MODEL, IDS, cells, last, backend=backend, progress=False).values
    want = by_hand(cells, last, backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert (got != sweep(MODEL, IDS, [[]], last, backend=backend, progress=False).values).any(1).all()


def test_the_time_after_a_reset_has_all_its_digits():
    """Not the difference of two sums in which a token of a huge step is."""
    dt = torch.rand(2, 9, 3, generator=torch.Generator().manual_seed(0)) * 0.01
    dt[:, 4] = 7e3
    still = Scanned(*[dt] * len(SCANNED))._still
    exact = torch.stack([dt.double()[:, t + 1 :].sum(1) for t in range(9)], 1)
    torch.testing.assert_close(still.double(), exact, rtol=1e-6, atol=0)


def test_cells_that_a_generator_makes_are_all_swept():
    cells = [[Zero(at.y(layer=i, pos=3)), Scale(at.z(layer=i), 0.5)] for i in range(N)]
    made = sweep(MODEL, IDS, ((edit for edit in cell) for cell in cells), score, progress=False)
    close(made.values, by_hand(cells, score))
    with pytest.raises(EditError, match="cells=None"):
        sweep(MODEL, IDS, None, score, progress=False)

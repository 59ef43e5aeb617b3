"""Knockouts: against the matrix form, against the mixer written out with loops, and without a leak to the bit."""

import importlib
import itertools
from dataclasses import replace

import pytest
import torch
from helpers import names_drawn, tiny
from stand_ins import STAND_INS, register
from torch.nn import functional as F

from interp import (
    Add,
    Apply,
    Knockout,
    Mean,
    Set,
    Zero,
    at,
    knockout,
    knockout_grid,
    knockout_leak,
    knockout_map,
    logit_diff,
    run,
)
from minimal_mamba.errors import AddressError, EditError, InputError, MambascopeError

BOTH = pytest.mark.parametrize("backend", ["reference", "torch", "fused"])  # fused: plain PyTorch in kernel layout
ROUTES = ("scan", "conv", "selection", "all")
MODEL = tiny(seed=6)
N, L = MODEL.config.n_layer, 9
RNG = torch.Generator().manual_seed(0)
IDS = torch.randint(0, 29, (2, L), generator=RNG)
OUT = at.mixer_out()
K = MODEL.config.d_conv


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    register(STAND_INS, monkeypatch)


def clean(model, ids, *places, **options):
    with torch.no_grad():
        found = run(model, ids, record=places, **options)
    return [found[p] for p in places]


def written_out(mixer, value, t, cut, baseline, change=lambda conv: conv):
    """mixer_out at t, (d,), of mixer_in (l, d), with the sources of `cut` {route: set} left out: loops, no tap.

    `change` is what becomes of each conv output.
    """
    e, n = mixer.A_log.shape
    everything = cut.get("all", set())

    def without(sources):
        changed = value.clone()
        changed[sorted(sources)] = baseline
        return mixer.in_proj(changed)[:, :e]

    x, weight = mixer.in_proj(value)[:, :e], mixer.conv1d.weight[:, 0]
    content, chosen = without(cut.get("conv", set()) | everything), without(cut.get("selection", set()) | everything)

    def conv(r, own, others):
        total = mixer.conv1d.bias.clone()
        for i in range(K):
            q = r - K + 1 + i
            if q >= 0:
                total = total + weight[:, i] * (own if q == r else others)[q]
        return F.silu(change(total))

    u, dt, B, C = [], [], [], []
    for r in range(t + 1):
        u.append(conv(r, content if r in everything else x, content))
        low, b_r, c_r = mixer.x_proj(conv(r, chosen, chosen)).split(mixer.sizes)
        if mixer.rms_eps is not None:
            low, b_r, c_r = (part / (part.square().mean() + mixer.rms_eps).sqrt() for part in (low, b_r, c_r))
        dt.append(F.softplus(mixer.dt_proj(low)))
        B.append(b_r)
        C.append(c_r)
    A, y = -mixer.A_log.exp(), mixer.D * u[t]
    for r in set(range(t + 1)) - set(cut.get("scan", set())):
        for c, i in itertools.product(range(e), range(n)):
            kept = torch.stack([dt[q][c] * A[c, i] for q in range(r, t + 1)])[1:].sum().exp()
            y = y.index_add(0, torch.tensor([c]), (C[t][i] * kept * dt[r][c] * B[r][i] * u[r][c])[None])
    z = mixer.in_proj(torch.as_tensor(baseline).expand(value.shape[1]) if t in everything else value[t])[e:]
    return mixer.out_proj(F.silu(z) * y)


@BOTH
def test_scan_is_the_matrix_form_with_zeroed_entries(backend):
    """y = M u with M written out, any entries zeroed, other ones for each row and each of two layers."""
    rng = torch.Generator().manual_seed(1)
    gone = torch.rand(2, 2, L, L, generator=rng).tril() > 0.6  # (layer, row, target, source)
    cuts = [
        Knockout(s, t, layer, "scan", rows=row)
        for layer, row, t, s in gone.nonzero().tolist()
    ]  # fmt: skip
    places = [getattr(at, site)(layer=[0, 1]) for site in ("u", "dt", "B", "C", "gate", "mixer_out")]
    with torch.no_grad():
        got = knockout(MODEL, IDS, cuts, record=places, backend=backend)
        u, dt, B, C, gate, out = (got[p] for p in places)  # (layer, b, l, ...)
        for layer in (0, 1):
            m = MODEL.backbone.layers[layer].mixer
            A = -m.A_log.exp()
            M = torch.zeros(2, m.D.numel(), L, L, dtype=torch.float64)  # (b, e, target, source)
            for t in range(L):
                for s in range(t + 1):
                    kept = torch.exp(dt[layer, :, s + 1 : t + 1].sum(1)[..., None] * A)  # (b, e, n)
                    M[:, :, t, s] = (kept * (C[layer, :, t] * B[layer, :, s])[:, None]).sum(-1) * dt[layer, :, s]
            M = M.masked_fill(gone[layer][:, None], 0)
            y = torch.einsum("bets,bse->bte", M, u[layer])
            expected = m.out_proj((y + m.D * u[layer]) * gate[layer])
            torch.testing.assert_close(out[layer], expected, rtol=1e-10, atol=1e-11)
        assert (out - clean(MODEL, IDS, at.mixer_out(layer=[0, 1]))[0]).abs().max() > 0.1


@pytest.mark.parametrize("model", [MODEL, tiny(seed=6, mixer_rms_eps=0.01)], ids=["Mamba", "FalconMamba"])
def test_every_route_is_its_equation(model):
    """One target of each row of the batch, with its own sources for each route, against loops over the equation."""
    value = clean(model, IDS, at.mixer_in(layer=1))[0]
    rng = torch.Generator().manual_seed(2)
    baseline = torch.randn(MODEL.config.d_model, generator=rng, dtype=torch.float64)
    subsets = [c for n in (1, 2, 3, 4) for c in itertools.combinations(ROUTES, n)]
    for trial, routes in enumerate(subsets):
        wanted, cuts = [], []
        for row in range(2):
            t = int(torch.randint(2, L, (), generator=rng))
            cut = {r: set(torch.randperm(t + 1, generator=rng)[: 1 + trial % 3].tolist()) for r in routes}
            wanted.append((row, t, cut))
            for route, sources in cut.items():
                mine = sorted(sources - {t}) if route == "conv" else sorted(sources)
                cuts += [Knockout(mine, t, 1, route, rows=row)] if mine else []
        with torch.no_grad():
            expected = clean(model, IDS, OUT)[0][1]  # nothing else in the layer changes
            for row, t, cut in wanted:
                expected[row, t] = written_out(model.backbone.layers[1].mixer, value[row], t, cut, baseline)
            for backend in ("reference", "torch", "fused"):
                out = knockout(model, IDS, cuts, record=OUT, baseline=baseline, backend=backend)[OUT][1]
                torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-11)


@BOTH
def test_each_route_is_a_run_under_edits(backend):
    """At the target, `all` is a run with the baseline at the source, `scan` one in which the source writes nothing."""
    for layer, s, t in ((0, 3, 5), (2, 4, 4), (1, 0, 8)):
        for route, edit in (
            ("all", Zero(at.mixer_in(layer=layer, pos=s))),
            ("scan", Zero(at.state_write(layer=layer, pos=s))),
        ):
            with torch.no_grad():
                by_hand = run(MODEL, IDS, edit, OUT, backend)[OUT][layer, :, t]
                out = knockout(MODEL, IDS, Knockout(s, t, layer, route), record=OUT, backend=backend)[OUT]
            torch.testing.assert_close(out[layer, :, t], by_hand, rtol=1e-10, atol=1e-12)
            assert (out[layer, :, t] - clean(MODEL, IDS, OUT)[0][layer, :, t]).abs().max() > 1e-3


def test_a_leak_is_a_share_of_what_the_layer_writes():
    """Whatever unit the layer writes in; 1 is as much as all that it writes."""
    cuts = [Knockout(2, 7, 1, "scan"), Knockout(4, 4, 1)]  # of the second the target writes nothing at all
    small, large = tiny(), tiny()
    with torch.no_grad():
        large.backbone.layers[1].mixer.out_proj.weight *= 1000
    leaks = [knockout_leak(m, IDS, cuts) for m in (small, large)]
    assert leaks[0] == pytest.approx(leaks[1]) and 0.1 < leaks[0][0] < 10 and leaks[0][1] == 0.0
    half = []
    for size in (0.1, 10):  # of the larger one the squares are beyond what 16 bits hold
        m = tiny()
        with torch.no_grad():
            m.backbone.layers[1].mixer.out_proj.weight *= size
        half.append(knockout_leak(m.half(), IDS, cuts)[0])
    assert 0.05 < half[0] == pytest.approx(half[1], rel=0.01)


@BOTH
def test_all_leaks_nothing_to_the_bit_and_scan_leaks_through_the_next_tokens(backend):
    options = {"backend": backend}
    for baseline in ("zero", "mean"):
        cuts = [Knockout(2, 7, 1), Knockout(slice(0, 3), [3, 5], [0, 2]), Knockout(4, 4, 1)]
        assert knockout_leak(MODEL, IDS, cuts, baseline=baseline, **options) == [0.0, 0.0, 0.0]
    assert knockout_leak(MODEL, IDS, Knockout(2, 7, 1, ("scan", "conv", "selection")), **options) == [0.0]
    for some in (("scan",), ("scan", "conv"), ("scan", "selection"), ("conv", "selection")):
        assert knockout_leak(MODEL, IDS, Knockout(2, 7, 1, some), **options)[0] > 1e-2
    # what scan lets through went into the conv: of s itself (its dt, so its decay), and of the next k - 1 tokens
    s, t, layer = 2, 7, 1

    def hold(pos):
        place = at.u(layer=layer, pos=pos)
        return [Set(place, clean(MODEL, IDS, place)[0])]

    def moved(edits):
        noise = Add(at.mixer_in(layer=layer, pos=s), torch.full((MODEL.config.d_model,), 3.0))
        with torch.no_grad():
            one, two = (
                knockout(MODEL, IDS, Knockout(s, t, layer, "scan"), record=OUT, edits=[*more, *edits], **options)[OUT]
                for more in ((), (noise,))
            )
        return float((one - two)[layer, :, t].abs().max())

    assert moved(()) > 1e-2 and moved(hold(slice(s, s + K))) == 0.0
    assert moved(hold(s)) > 1e-2 and moved(hold(slice(s + 1, s + K))) > 1e-3


def test_huge_values_at_the_source_change_no_bit():
    for dtype, size in ((torch.float64, 1e100), (torch.float32, 1e15)):
        model, s, t = tiny(seed=6, dtype=dtype), 3, [4, 8]
        outs = []
        for value in (0.0, size, -size):
            edit = Set(at.mixer_in(layer=1, pos=s), torch.full((), value, dtype=dtype))
            with torch.no_grad():
                outs.append(knockout(model, IDS, Knockout(s, t, 1), edits=edit, record=OUT)[OUT][1][:, t])
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2]) and outs[0].isfinite().all()


@BOTH
def test_targets_of_one_layer_have_their_own_sources(backend):
    cuts = [
        Knockout([0, 2], 5, 1), Knockout(3, [6, 7], 1), Knockout(1, 6, 1, "scan"), Knockout(2, 8, 1, "conv"),
        Knockout(7, 8, 1, "selection"),
    ]  # fmt: skip
    with torch.no_grad():
        out = knockout(MODEL, IDS, cuts, record=OUT, backend=backend)[OUT][1]
        for t in range(L):
            mine = [c for c in cuts if t in c.pairs(L)]
            alone = knockout(MODEL, IDS, mine, record=OUT, backend=backend)[OUT] if mine else clean(MODEL, IDS, OUT)[0]
            torch.testing.assert_close(out[:, t], alone[1][:, t], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("route", ROUTES)
def test_a_set_is_the_union_of_its_pairs(route):
    whole = Knockout(slice(1, 4), [5, 6], [0, 2], route)
    pairs = [Knockout(s, t, i, route) for s in (1, 2, 3) for t in (5, 6) for i in (0, 2)]
    with torch.no_grad():
        one, other = (knockout(MODEL, IDS, cuts).logits for cuts in (whole, [*pairs, pairs[0]]))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@BOTH
def test_layers_see_the_cuts_below(backend):
    """Two layers by hand: each cut output is put in with Set, the second made from what the first left."""
    s, t = 2, 6
    with torch.no_grad():
        edits = []
        for layer in (0, 2):
            value = run(
                MODEL, IDS, [*edits, Zero(at.mixer_in(layer=layer, pos=s))], at.mixer_out(layer=layer, pos=t), backend
            )
            edits.append(Set(at.mixer_out(layer=layer, pos=t), value[at.mixer_out(layer=layer, pos=t)]))
        by_hand = run(MODEL, IDS, edits, backend=backend).logits
        got = knockout(MODEL, IDS, Knockout(s, t, [0, 2]), backend=backend).logits
    torch.testing.assert_close(got, by_hand, rtol=1e-10, atol=1e-12)


@BOTH
def test_padded_rows_are_what_they_are_alone(backend):
    lengths = [9, 5]
    cuts = [Knockout(-3, -1, [0, 1]), Knockout(1, slice(2, None), 2, "scan"), Knockout(0, [1, -1], 1, "selection")]
    baseline = torch.randn(N, 12, generator=RNG, dtype=torch.float64)
    where = at.mixer_out(layer=1)
    with torch.no_grad():
        both = knockout(MODEL, IDS, cuts, lengths=lengths, baseline=baseline, backend=backend, record=where)
        last = knockout(MODEL, IDS, cuts, lengths=lengths, baseline=baseline, backend=backend, last_only=True)
        for row, size in enumerate(lengths):
            ids = IDS[row : row + 1, :size]
            alone = knockout(MODEL, ids, cuts, baseline=baseline, backend=backend, record=where)
            torch.testing.assert_close(both.logits[row, :size], alone.logits[0], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(both[where][row, :size], alone[where][0], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(last.logits[row, 0], alone.logits[0, -1], rtol=1e-10, atol=1e-12)
        assert not both.logits[1, 5:].any()
    assert knockout_leak(MODEL, IDS, cuts, lengths=lengths, baseline="mean", backend=backend)[0] == 0.0


def test_the_baselines():
    with torch.no_grad():
        own = clean(MODEL, IDS, at.mixer_in())[0]
        cut = Knockout([1, 3], [4, 8], slice(None))
        plain = run(MODEL, IDS).logits
        same = knockout(MODEL, IDS, Knockout([1, 3], [4, 8], 0), baseline=own).logits
        torch.testing.assert_close(same, plain, rtol=1e-10, atol=1e-12)  # a token replaced by itself
        mean = knockout(MODEL, IDS, cut, baseline="mean").logits
        given = knockout(MODEL, IDS, cut, baseline=own.mean((1, 2))).logits
        torch.testing.assert_close(mean, given, rtol=1e-12, atol=1e-13)
        assert (mean - knockout(MODEL, IDS, cut).logits).abs().max() > 1e-3
        padded = own.clone()
        padded[:, 1, 5:] = torch.nan
        short = knockout(MODEL, IDS, cut, lengths=[9, 9], baseline="mean").logits
        torch.testing.assert_close(short, mean, rtol=1e-12, atol=1e-13)
        ragged = [Knockout(1, 4, 0)]
        mean5 = padded.nanmean((1, 2))
        torch.testing.assert_close(
            knockout(MODEL, IDS, ragged, lengths=[9, 5], baseline="mean").logits,
            knockout(MODEL, IDS, ragged, lengths=[9, 5], baseline=mean5).logits, rtol=1e-12, atol=1e-13,
        )  # fmt: skip


@BOTH
def test_edits_are_made_in_the_cut_outputs_too(backend):
    edits = [Add(at.ssm_state(layer=1, pos=4), 0.3), Apply(at.u(layer=1), torch.tanh), Zero(at.embed(pos=1), rows=[1])]
    with torch.no_grad():
        by_hand = run(MODEL, IDS, [Zero(at.mixer_in(layer=1, pos=2)), *edits], OUT, backend)[OUT]
        got = knockout(MODEL, IDS, Knockout(2, 6, 1), edits=edits, record=OUT, backend=backend)[OUT]
    torch.testing.assert_close(got[1, :, 6], by_hand[1, :, 6], rtol=1e-10, atol=1e-12)


@BOTH
@pytest.mark.parametrize("change", [lambda conv: conv * 0 + 0.7, torch.tanh])
def test_an_edit_of_the_conv_changes_what_the_cut_leaves_of_it(change, backend):
    value, edit = clean(MODEL, IDS, at.mixer_in(layer=1))[0], Apply(at.conv(layer=1), change)
    for routes in ("conv", "selection", "all", ("conv", "selection"), ("scan", "conv", "selection")):
        with torch.no_grad():
            got = knockout(MODEL, IDS, Knockout(2, 4, 1, routes), edits=edit, record=OUT, backend=backend)[OUT][1]
            cut = {route: {2} for route in ([routes] if isinstance(routes, str) else routes)}
            for row in range(2):
                expected = written_out(MODEL.backbone.layers[1].mixer, value[row], 4, cut, 0.0, change)
                torch.testing.assert_close(got[row, 4], expected, rtol=1e-10, atol=1e-11)


@BOTH
def test_the_mean_of_outputs_is_that_of_the_cut_ones(backend):
    cut, place = Knockout(2, 4, 1, rows=0), at.mixer_out(layer=1, pos=4)
    with torch.no_grad():
        outputs = knockout(MODEL, IDS, cut, record=place, backend=backend)[place]
        got = knockout(MODEL, IDS, cut, edits=Mean(place), record=place, backend=backend)[place]
    torch.testing.assert_close(got, outputs.mean(0, keepdim=True).expand(2, -1), rtol=1e-10, atol=1e-12)
    assert (outputs[0] - clean(MODEL, IDS, place)[0][0]).abs().max() > 1e-3


def test_recordings_are_those_of_the_run_and_states_do_not_change():
    places = [at.ssm_state(layer=1), at.state_read(layer=1, pos=-1), at.resid_post(layer=1), at.logits(pos=[0, 3])]
    with torch.no_grad():
        got = knockout(MODEL, IDS, Knockout(2, 6, 1), record=places)
        for place, value in zip(places[:2], clean(MODEL, IDS, *places[:2]), strict=True):
            torch.testing.assert_close(got[place], value, rtol=1e-12, atol=1e-13)  # only the output is cut
        assert got[places[2]].shape == (2, L, 12) and torch.equal(got[places[3]], got.logits[:, [0, 3]])
        assert got.logits.shape[0] == 2 and torch.equal(got.ids, IDS)


def test_gradients_flow_and_float32_is_finite():
    model = tiny(seed=6, dtype=torch.float32)
    out = knockout(model, IDS, [Knockout(s, 8, slice(None), r) for s, r in enumerate(ROUTES)])
    assert out.logits.isfinite().all() and out.logits.dtype == torch.float32
    logit_diff(out, 3, 5).sum().backward()
    assert model.backbone.embedding.weight.grad.isfinite().all()


@pytest.mark.parametrize("through", [*ROUTES, ("scan", "conv")])
def test_every_cell_of_a_grid_is_a_knockout(through):
    def metric(logits):
        return logit_diff(logits, torch.tensor([3, 4]), 5)

    grid = knockout_grid(MODEL, IDS, metric, window=2, sources=[1, 5, -2], through=through, batch=5, progress=False)
    assert (grid.layers, grid.sources, grid.values.shape) == (((0, 1), (1, 2)), (1, 5, 7), (2, 3, 2))
    with torch.no_grad():
        for i, j in itertools.product(range(2), range(3)):
            one = knockout(MODEL, IDS, Knockout(grid.sources[j], -1, grid.layers[i], through))
            torch.testing.assert_close(grid.values[i, j], metric(one.logits), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(grid.base, metric(run(MODEL, IDS).logits), rtol=1e-12, atol=1e-12)
    assert grid.error().shape == (2, 3) and (grid.effect() == grid.values - grid.base).all()


@BOTH
@pytest.mark.parametrize("target", [0, 4, -2])
def test_metrics_of_grids_may_read_every_position(target, backend):
    """Also before the target, where a cut changes nothing, and after it; layers of a window need not be neighbours."""

    def metric(logits):
        return logits[:, :, 3].sum(1) - logits[:, 0, 5] * logits[:, -1].logsumexp(-1)

    options = {"target": target, "layers": [(0, 2), 1], "backend": backend, "progress": False}
    grid = knockout_grid(MODEL, IDS, metric, **options)
    assert grid.sources == tuple(range(target % L + 1))
    with torch.no_grad():
        for i, layers in enumerate(([0, 2], 1)):
            for j, source in enumerate(grid.sources):
                one = knockout(MODEL, IDS, Knockout(source, target, layers), backend=backend)
                torch.testing.assert_close(grid.values[i, j], metric(one.logits), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("l", "batch", "cells"), [(2048, None, [4, 2]), (2048, 3, [3, 3]), (9, None, [6])])
def test_a_grid_runs_fewer_rows_at_a_time_of_long_prompts(monkeypatch, l, batch, cells):
    """8,192 tokens, unless the batch is given; else a short grid of a long prompt asks for what no machine has."""
    module, seen = importlib.import_module("interp.knockout_grid"), []
    monkeypatch.setattr(
        module, "_cells", lambda base, cuts, *_: seen.append(len(cuts)) or torch.zeros(len(cuts), 1, 1, 1)
    )
    ids = torch.zeros(1, l, dtype=torch.long)
    knockout_grid(MODEL, ids, lambda x: x[:, -1, 0], sources=range(6), layers=2, batch=batch, progress=False)
    assert seen == cells


def test_grids_of_padded_batches_and_of_given_baselines():
    own = clean(MODEL, IDS, at.mixer_in())[0].roll(1, 2)
    lengths = [9, 6]
    grid = knockout_grid(
        MODEL, IDS, lambda x: logit_diff(x, 3, 5), layers=[2, (0, 1)], lengths=lengths, baseline=own, progress=False
    )
    assert grid.sources == (0, 1, 2, 3, 4, 5) and grid.layers == ((2,), (0, 1))
    with torch.no_grad():
        one = knockout(MODEL, IDS, Knockout(4, -1, 2), lengths=lengths, baseline=own)
    torch.testing.assert_close(grid.values[0, 4], logit_diff(one, 3, 5), rtol=1e-11, atol=1e-12)


def test_a_knockout_is_a_value():
    one = Knockout([1, 2], slice(3, None), 0, through=["all", "scan"], rows=[1])
    assert one == Knockout((1, 2), slice(3, None), 0, through=("scan", "all"), rows=(1,)) and len({one, one}) == 1
    assert str(one) == "Knockout(source=[1, 2], target=3:, layer=0, through=['scan', 'all'], rows=[1])"
    assert str(Knockout(0, -1, 2)) == "Knockout(source=0, target=-1, layer=2, through='all')"
    assert Knockout(slice(0, 3), [1, 2], 0).pairs(5) == {1: [0, 1], 2: [0, 1, 2]}
    assert Knockout(slice(0, 3), [1, 3], 0, "conv").pairs(5) == {1: [0], 3: [0, 1, 2]}


@pytest.mark.parametrize(
    ("make", "kind", "says"),
    [
        (lambda: Knockout(0, 1, 0, "scann"), EditError, "Did you mean 'scan'"),
        (lambda: Knockout(0, 1, 0, ()), EditError, "at least one"),
        (lambda: Knockout(0.5, 1, 0), AddressError, "source=0.5"),
        (lambda: [Knockout(5, 3, 0)], AddressError, "target 3 is in no pair"),
        (lambda: [Knockout([1, 5], 3, 0)], AddressError, "source 5 is in no pair"),
        (lambda: [Knockout(3, 3, 0, "conv")], AddressError, "after its source"),
        (lambda: [Knockout(0, 9, 0)], AddressError, "target=9 does not exist"),
        (lambda: [Knockout(0, 1, 3)], AddressError, "layer=3 does not exist"),
        (lambda: [Knockout(0, 1, 0, rows=2)], AddressError, "row=2 does not exist"),
        (lambda: [], EditError, "at least one Knockout"),
        (lambda: [Zero(at.x())], EditError, "Knockouts only"),
    ],
)
def test_what_cannot_be_cut_is_said(make, kind, says):
    with pytest.raises(kind, match=says) as caught:
        knockout(MODEL, IDS, make())
    assert isinstance(caught.value, MambascopeError)


def test_bad_baselines_and_grids_are_said():
    cut = Knockout(0, 1, 0)
    with pytest.raises(InputError, match="Did you mean 'mean'"):
        knockout(MODEL, IDS, cut, baseline="meen")
    with pytest.raises(InputError, match="one of"):
        knockout(MODEL, IDS, cut, baseline=torch.zeros(11))
    with pytest.raises(InputError, match="NaN at a source of layer 0"):
        knockout(MODEL, IDS, cut, baseline=torch.full((12,), torch.nan))
    with pytest.raises(InputError, match="window=4"):
        knockout_grid(MODEL, IDS, lambda x: x[:, -1, 0], window=4, progress=False)


def test_the_map_shows_the_mean_and_marks_what_is_not_sure():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grid = knockout_grid(
        MODEL,
        IDS.repeat(2, 1)[:3],
        lambda x: logit_diff(x, 3, 5),
        layers=[0, (1, 2)],
        sources=[2, 4, 7],
        progress=False,
    )
    ax = knockout_map(grid, tokens=[f"w{i}" for i in range(L)], unit="nats")
    mean = grid.effect().mean(-1)
    assert torch.equal(torch.from_numpy(ax.images[0].get_array().data), mean)
    assert ax.images[0].get_clim() == (-mean.abs().max(), mean.abs().max())
    assert [t.get_text() for t in ax.get_xticklabels()] == ["w2", "w4", "w7"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "1-2"]
    unsure = (mean.abs() < 2 * grid.error()) & (mean.abs() >= mean.abs().max() / 20)
    dots = sorted((int(y), int(x)) for x, y in ax.collections[0].get_offsets())
    assert dots == [tuple(i) for i in unsure.nonzero().tolist()] and dots
    assert ax.figure.axes[1].get_ylabel() == "effect (nats)\ndot: under 2 s.e. from 0"
    plt.close("all")
    with pytest.raises(InputError, match="labels"):
        knockout_map(grid, tokens=["a"])
    holed = grid.values.clone()
    holed[0, 1] = float("nan")
    ax = knockout_map(replace(grid, values=holed))
    assert ax.images[0].get_clim()[1] == (holed - grid.base).mean(-1).nan_to_num().abs().max()
    assert "hatched" in ax.figure.axes[1].get_ylabel()
    image = knockout_map(replace(grid, values=grid.base.expand_as(grid.values)), colorbar=False).images[0]
    assert image.cmap(image.norm(0.0)) == image.cmap(0.5)
    with pytest.raises(InputError, match="ends above 0"):
        knockout_map(grid, limit=0)
    one = knockout_grid(MODEL, IDS[:1], lambda x: x[:, -1, 0], layers=[0], sources=2, progress=False)
    with pytest.raises(InputError, match="at least 2 rows"):
        one.error()
    knockout_map(one)
    many = replace(grid, values=torch.randn(2, 64, 3), base=torch.zeros(3), sources=tuple(range(64)))
    for tokens, least in ((None, 7), (["$ incomprehensible"] * 64, 16)):
        names = names_drawn(knockout_map(many, tokens=tokens), "x")
        assert least <= len(names) < 40 and (tokens is None or names[0] == r"\$ incompreh…")
    plt.close("all")

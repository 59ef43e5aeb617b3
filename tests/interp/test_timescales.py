"""Time scales against cases that can be worked out by hand."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import names_drawn, tiny
from torch.testing import assert_close

from analyses.planted import plant
from interp import Add, Scale, Set, Zero, at, freeze, logit_diff, run
from interp.plots import field_curves, half_life_curves
from interp.timescales import (
    ReceptiveField,
    decay_bands,
    effective_rank,
    gradient_field,
    half_lives,
    mean_dt,
    receptive_field,
    state_flow,
    state_rank,
    typical_dt,
)
from minimal_mamba.errors import AddressError, EditError, InputError

BACKENDS = ["reference", "torch"]


def ids(l, b=2, seed=0):
    return torch.randint(29, (b, l), generator=torch.Generator().manual_seed(seed))


def test_after_its_half_life_half_of_the_state_is_left():
    model = tiny()
    dt = torch.rand(3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    lives = half_lives(model, dt)
    for i, layer in enumerate(model.backbone.layers):
        A = -layer.mixer.A_log.exp()
        left = torch.exp(dt[i][:, None] * A) ** lives[i]
        assert_close(left, torch.full_like(left, 0.5))
    assert_close(half_lives(model, 2 * dt), lives / 2)
    one = half_lives(model, 0.1)
    assert_close(one[1], math.log(2) / (0.1 * model.backbone.layers[1].mixer.A_log.exp()))


def test_the_typical_step_is_the_one_that_the_model_takes_where_dt_low_is_zero():
    model = tiny()
    ids = torch.arange(7)[None]
    out = run(model, ids, edits=[Zero(at.dt_low(layer=1))], record=[at.dt(layer=1)])
    assert_close(out[at.dt(layer=1)], typical_dt(model)[1].expand(1, 7, 24))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["accumulator", "recall", "two"])
def test_planted_half_lives_are_found(name, seed):
    known = plant(name, seed)
    lives = half_lives(known.model, mean_dt(known.model, known.ids))
    for place, tokens in known.truth.half_life.items():
        assert float(lives[place]) == pytest.approx(tokens, rel=1e-6)


@pytest.mark.parametrize("bands", [1, 4, 7, np.int64(7), [0.5, 2.0, 10.0], [1e9]])
def test_every_pair_is_in_one_band_and_bands_rise(bands):
    model = tiny()
    life = half_lives(model)[2]
    masks = decay_bands(model, -1, bands)
    assert torch.equal(sum(m.int() for m in masks), torch.ones(24, 5, dtype=torch.int32))
    ends = [(life[m].min(), life[m].max()) for m in masks if m.any()]
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends))
    if not isinstance(bands, list):
        assert {int(m.sum()) for m in masks} <= {120 // bands, 120 // bands + 1}
    else:
        assert len(masks) == len(bands) + 1
        for mask, low, high in zip(masks, [0, *bands], [*bands, math.inf], strict=True):
            assert torch.equal(mask, (life >= low) & (life < high))


def test_a_pair_at_the_cut_is_in_the_slower_band():
    model = tiny()
    life = half_lives(model)[0]
    cut = float(life[7, 3])
    fast, slow = decay_bands(model, 0, [cut])
    assert slow[7, 3] and torch.equal(fast, life < cut)


def test_bands_follow_the_step_size_that_is_given():
    model = tiny()
    dt = torch.ones(24, dtype=torch.float64)
    dt[:3] = 1e-6  # these channels remember for ever
    slow = decay_bands(model, 0, [1e4], dt=dt)[1]
    assert torch.equal(slow.any(1), torch.arange(24) < 3) and slow[:3].all()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_band_can_be_edited(backend):
    model = tiny()
    ids = torch.arange(14).reshape(2, 7)
    mask = decay_bands(model, 1, 3)[1]
    place = at.ssm_state(layer=1)
    out = run(model, ids, edits=[Scale(place, ~mask)], record=[place], backend=backend)
    assert not out[place][:, :, mask].any() and out[place][:, :, ~mask].all()


def test_what_cannot_be_grouped_says_so():
    model = tiny()
    for bands in (0, 121, True, [], [2.0, 1.0], [-1.0], [0.0]):
        with pytest.raises(InputError, match="bands="):
            decay_bands(model, 0, bands)
    with pytest.raises(AddressError):
        decay_bands(model, 3)
    for dt in (-1.0, torch.ones(23), torch.full((24,), torch.nan)):
        with pytest.raises(InputError, match="dt has shape"):
            half_lives(model, dt)


def even(layer=1, **values):
    """Edits that make a layer's inputs the same at every position: dt, u, B and C given, one number each."""
    return [Set(getattr(at, site)(layer=layer), value) for site, value in values.items()]


def test_the_mean_step_is_over_real_tokens():
    model, tokens = tiny(), ids(7)
    found = mean_dt(model, tokens, lengths=[7, 4])
    dt = [run(model, row[None, :l], record=[at.dt()])[at.dt()][:, 0] for row, l in zip(tokens, (7, 4), strict=True)]
    assert_close(found, torch.cat(dt, 1).mean(1))
    assert found.shape == (3, 24)


# -- receptive field --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("l", [1, 2, 7, 63])
def test_even_time_and_one_decay_give_the_geometric_series(l, backend):
    model = tiny()
    rate = 0.3
    model.backbone.layers[1].mixer.A_log.data.fill_(math.log(rate))
    edits = even(dt=0.7, u=1.0, B=1.0, C=1.0)
    found = receptive_field(model, ids(l), 1, edits=edits, backend=backend)
    terms = torch.exp(torch.arange(l, dtype=torch.float64) * -rate * 0.7)
    assert_close(found.share, (terms / terms.sum()).expand(2, l), rtol=1e-12, atol=1e-14)
    assert not found.before.any()
    assert_close(found.mean_distance(), ((torch.arange(l) * terms).sum() / terms.sum()).expand(2))
    q = math.exp(-rate * 0.7)  # within distance w lies (1 - q^(w+1)) / (1 - q^l)
    within = [(1 - q ** (w + 1)) / (1 - q**l) for w in range(l)]
    assert found.width(0.8).tolist() == [next(w for w, part in enumerate(within) if part >= 0.8)] * 2


def test_all_that_is_read_lies_within_the_run_that_began_afresh():
    """In float32 the shares sum to 1 but for rounding."""
    model, rng = tiny(dtype=torch.float32), torch.Generator().manual_seed(0)
    for _ in range(20):
        field = receptive_field(model, torch.randint(0, 29, (4, 9), generator=rng), 1)
        last = [int(row.nonzero().max()) for row in field.share]
        assert field.width(1.0).tolist() == last


def test_the_width_is_the_first_distance_that_is_enough():
    share = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.4, 0.3, 0.0, 0.0]], dtype=torch.float64)
    field = ReceptiveField(share, torch.tensor([0.0, 0.3], dtype=torch.float64))
    assert field.width(0.5).tolist() == [0, 1] and field.width(0.7).tolist() == [1, 1]
    assert field.width(0.75).tolist() == [1, math.inf]  # the rest of the second row is older than the run
    assert field.width(0.76).tolist() == [2, math.inf] and field.width(1.0).tolist() == [2, math.inf]
    for dtype in (torch.float32, torch.float64):  # 1 - 0.9 is not 0.1: what rounding adds is no part of the rest
        edge = ReceptiveField(torch.tensor([[0.9, 0.1]], dtype=dtype), torch.zeros(1, dtype=dtype))
        assert edge.width(0.9).tolist() == [0]
    assert_close(field.mean_distance(), torch.tensor([0.75, 3 / 7], dtype=torch.float64))


@pytest.mark.parametrize("pos", [-1, 4])
def test_a_share_is_what_goes_when_that_token_writes_nothing(pos):
    model, tokens = tiny(), ids(7)
    y = at.y(layer=2, pos=pos)
    clean, t = run(model, tokens, record=[y])[y], pos % 7
    sizes = torch.stack(
        [
            (clean - run(model, tokens, Zero(at.state_write(layer=2, pos=t - j)), [y])[y]).abs().sum(1)
            for j in range(t + 1)
        ],
        1,
    )
    found = receptive_field(model, tokens, 2, pos=pos)
    assert_close(found.share[:, : t + 1], sizes / sizes.sum(1, keepdim=True), rtol=1e-9, atol=1e-12)
    assert not found.share[:, t + 1 :].any() and found.share.shape == (2, 7)


def test_a_carried_memory_has_a_share_of_its_own():
    model, tokens = tiny(), ids(9)
    before = run(model, tokens[:, :5], keep_state=True).state
    y = at.y(layer=1, pos=-1)
    clean = run(model, tokens[:, 5:], record=[y], state=before)[y]
    blank = type(before)(
        (before.ssm_state[0], torch.zeros_like(before.ssm_state[1]), before.ssm_state[2]), before.conv_state,
        before.position,
    )  # fmt: skip
    gone = (clean - run(model, tokens[:, 5:], record=[y], state=blank)[y]).abs().sum(1)
    found = receptive_field(model, tokens[:, 5:], 1, state=before)
    assert_close(found.share.sum(1) + found.before, torch.ones(2, dtype=torch.float64))
    whole = receptive_field(model, tokens, 1)
    scale = (1 - found.before)[:, None]
    assert_close(found.share / scale, whole.share[:, :4] / whole.share[:, :4].sum(1, keepdim=True))
    own = found.share[:, 0] / found.before  # the token's own part against the memory's, in y itself
    written = (
        (clean - run(model, tokens[:, 5:], Zero(at.state_write(layer=1, pos=-1)), [y], state=before)[y]).abs().sum(1)
    )
    assert_close(own, written / gone)


def test_padded_rows_look_back_as_they_do_alone():
    model, tokens = tiny(), ids(7)
    both = receptive_field(model, tokens, 1, lengths=[7, 4])
    assert_close(both.share[1:, :4], receptive_field(model, tokens[1:, :4], 1).share)
    assert not both.share[1, 4:].any()

    def metric(logits):
        return logit_diff(logits, 3, 5)

    seen = gradient_field(model, tokens, metric, lengths=[7, 4])
    assert_close(seen.share[1:, :4], gradient_field(model, tokens[1:, :4], metric).share)
    assert not seen.share[1, 4:].any()

    rows = tokens.tolist()  # ids may be lists, as of `run`
    assert torch.equal(receptive_field(model, rows, 1, lengths=[7, 4]).share, both.share)
    assert torch.equal(gradient_field(model, rows, metric, lengths=[7, 4]).share, seen.share)


@pytest.mark.parametrize("backend", BACKENDS)
def test_through_all_layers_a_gradient_is_a_finite_difference(backend):
    model, tokens = tiny(), ids(5)

    def metric(logits):
        return logit_diff(logits, 3, 5)

    found = gradient_field(model, tokens, metric, backend=backend)
    norms, step = [], 1e-5
    for j in range(5):
        slopes = []
        for d in range(12):
            push = torch.zeros(12, dtype=torch.float64)
            push[d] = step
            ends = [metric(run(model, tokens, Add(at.embed(pos=4 - j), s * push)).logits) for s in (1, -1)]
            slopes.append((ends[0] - ends[1]) / (2 * step))
        norms.append(torch.stack(slopes).norm(dim=0))
    size = torch.stack(norms, 1)
    assert_close(found.share, size / size.sum(1, keepdim=True), rtol=1e-6, atol=1e-8)


# -- write, keep, read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_even_writes_fill_the_state_up_to_its_limit(backend):
    model = tiny()
    model.backbone.layers[1].mixer.A_log.data.fill_(math.log(0.5))
    flow = state_flow(model, ids(40), 1, edits=even(dt=0.8, u=2.0, B=1.0, C=0.25), backend=backend)
    q, t = math.exp(-0.4), torch.arange(40, dtype=torch.float64)
    root = math.sqrt(5)  # the norm over n of five equal numbers
    state = 1.6 * (1 - q ** (t + 1)) / (1 - q)  # 1.6 = dt B u, summed with ratio q
    keep = state - 1.6
    for found, value in (
        (flow.write, torch.full_like(t, 1.6 * root)), (flow.keep, keep * root), (flow.state, state * root),
        (flow.from_write, torch.full_like(t, 1.6 * 1.25)), (flow.from_keep, keep * 1.25),
    ):  # fmt: skip
        assert_close(found, value[:, None].expand(2, 40, 24), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_flow_is_that_of_the_recorded_states(backend):
    model, tokens = tiny(), ids(9)
    start = run(model, tokens[:, :2], keep_state=True).state
    sites = [at.state_write(layer=0), at.decay(layer=0), at.ssm_state(layer=0), at.y(layer=0), at.C(layer=0)]
    out = run(model, tokens[:, 2:], record=sites, state=start, lengths=[7, 4], backend=backend)
    write, decay, h, y, C = (out[a].nan_to_num() for a in sites)
    flow = state_flow(model, tokens[:, 2:], 0, state=start, lengths=[7, 4], backend=backend)
    real = (torch.arange(7) < torch.tensor([7, 4])[:, None])[..., None]
    before = torch.cat([start.ssm_state[0][:, None], h[:, :-1]], 1)
    assert_close(flow.write, write.norm(dim=-1) * real)
    assert_close(flow.keep, (decay * before).norm(dim=-1) * real)
    assert_close(flow.state, h.norm(dim=-1) * real)
    assert_close(flow.from_write + flow.from_keep, y * real)
    assert_close(flow.from_write, torch.einsum("blen,bln->ble", write, C) * real)


# -- rank -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 6])
def test_samples_in_k_equal_directions_have_rank_k(k):
    rng = torch.Generator().manual_seed(k)
    basis = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64, generator=rng))[0][:k]
    samples = torch.cat([basis, -basis]) + 5.0  # centred, of equal size in k directions
    found = effective_rank(samples)
    assert_close(found.participation, torch.tensor(float(k), dtype=torch.float64))
    assert int(found.above) == k
    assert_close(found.spectrum[:k], torch.full((k,), math.sqrt(2), dtype=torch.float64))
    assert int(effective_rank(samples, centre=False).above) == k + 1  # the mean is a direction too


def test_unequal_directions_count_less():
    samples = torch.diag(torch.tensor([3.0, 1.0, 0.02], dtype=torch.float64))
    found = effective_rank(torch.cat([samples, -samples]))
    s2 = torch.tensor([9.0, 1.0, 0.0004], dtype=torch.float64)
    assert_close(found.participation, s2.sum() ** 2 / (s2**2).sum())
    assert int(found.above) == 2 and int(effective_rank(torch.cat([samples, -samples]), threshold=1e-3).above) == 3
    nothing = effective_rank(torch.zeros(4, 3))
    assert nothing.participation == 0 and nothing.above == 0
    several = effective_rank(torch.stack([samples, 2 * samples]), centre=False)
    assert several.participation.shape == (2,) and several.above.tolist() == [2, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_rank_of_the_states(backend):
    model, tokens = tiny(), ids(7)
    one = state_rank(model, tokens, 1, edits=even(dt=0.8, u=1.0, B=1.0, C=1.0), backend=backend)
    state = at.ssm_state(layer=1)
    h = run(model, tokens, even(dt=0.8, u=1.0, B=1.0, C=1.0), [state])[state].flatten(2).flatten(0, 1)
    values = torch.linalg.eigvalsh(torch.cov(h.T)).clamp(min=0)
    assert_close(one.participation, values.sum() ** 2 / (values**2).sum())
    still = state_rank(model, tokens, 1, edits=Set(at.dt(layer=1), 0.0), backend=backend)
    assert still.participation == 0 and still.above == 0
    padded = state_rank(model, tokens, 1, lengths=[7, 4], backend=backend)
    alone = [run(model, r[None, :l], record=[state])[state][0].flatten(1) for r, l in zip(tokens, (7, 4), strict=True)]
    assert_close(padded.spectrum, effective_rank(torch.cat(alone)).spectrum)


def test_edits_inside_the_recurrence_are_refused():
    model, tokens = tiny(), ids(7)
    for fn in (receptive_field, state_flow):
        with pytest.raises(EditError, match="take other layers"):
            fn(model, tokens, 1, edits=[Zero(at.ssm_state(layer=1, pos=3))])
    with pytest.raises(InputError, match="one vector a position"):
        gradient_field(model, tokens, lambda logits: logits[:, -1, 0], site=at.embed(pos=2))


def test_the_curves_are_shares_of_pairs_and_of_what_is_read():
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    model, tokens = tiny(), ids(7)
    lives = half_lives(model)
    ax = half_life_curves(lives, length=7)
    x, y = ax.lines[1].get_data()
    middle = float(lives[1].median())
    assert y[list(x).index(middle)] == 0.5 and y[-1] == 1 and ax.get_xscale() == "log"
    fields = [receptive_field(model, tokens, i) for i in range(3)]
    drawn = field_curves(fields).lines[2].get_ydata()
    assert_close(torch.tensor(drawn), fields[2].share.cumsum(1).mean(0))
    plt.close("all")


def test_the_curves_are_named_by_their_layers_and_those_that_are_not_there_are_said(pyplot):
    def texts(ax):
        legend = ax.get_legend()
        return [] if legend is None else [t.get_text() for t in legend.get_texts()], [t.get_text() for t in ax.texts]

    model, tokens = tiny(n_layer=4), ids(7)
    some = [receptive_field(model, tokens, layer) for layer in (3, 1)]
    everything = gradient_field(model, tokens, lambda logits: logits[:, -1, 0])
    assert [field.layer for field in (*some, everything)] == [3, 1, None]
    assert texts(field_curves([*some, everything])) == (["3", "1", "all"], [])
    still = receptive_field(model, tokens, 2, edits=freeze(2))
    half = receptive_field(model, tokens, 2, edits=freeze(2, rows=[0]))
    assert texts(field_curves([some[0], still])) == (["3"], ["nothing is read: layer 2"])
    ax = field_curves([half])
    assert texts(ax) == (["2"], [f"nothing is read: layer 2 (1 of {len(tokens)} rows)"])
    assert_close(torch.tensor(ax.lines[0].get_ydata()), half.share[1:].cumsum(1).mean(0))

    lives = half_lives(model)
    assert texts(half_life_curves(lives[[1, 3]], layers=[1, 3])) == (["1", "3"], [])
    with pytest.raises(InputError, match="lives has 4; name each"):
        half_life_curves(lives, layers=[0])
    endless = half_lives(model, torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None].expand(-1, model.config.d_inner))
    assert texts(half_life_curves(endless)) == (["1", "3"], ["never forgets: layer 0, 2"])
    ax = half_life_curves(half_lives(model, 0.0))
    ax.figure.canvas.draw()
    assert texts(ax) == ([], ["never forgets: layer 0, 1, 2, 3"]) and not ax.lines


def test_many_layers_have_a_bar_of_their_colours(pyplot):
    lives = torch.rand(24, 3, 5, dtype=torch.float64) + 0.5
    fields = [replace(ReceptiveField(torch.eye(5)[:2], torch.zeros(2)), layer=i) for i in range(24)]
    for ax in (half_life_curves(lives), field_curves(fields)):
        colours = [line.get_color() for line in ax.lines]
        assert len(set(colours)) == 24 and ax.get_legend() is None
        shown = names_drawn(ax.figure.axes[1], "y")
        assert shown[0] == "0" and len(shown) >= 5


@pytest.fixture
def pyplot():
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")

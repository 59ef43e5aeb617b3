"""Ablations against identities: of the recurrence written out, and of the model whose circuit is known."""

import pytest
import torch
from helpers import tiny
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from analyses.planted import plant
from interp import Mean, Set, at, generate, load_edits, run, save_edits
from interp.ablation import ablate, derangement, forget, freeze, mean_of, set_where
from interp.timescales import decay_bands
from minimal_mamba.errors import EditError, InputError, ShapeMismatch

BACKENDS = ["reference", "torch"]
STATE = at.ssm_state(layer=1)


def ids(l, b=3, seed=0):
    return torch.randint(29, (b, l), generator=torch.Generator().manual_seed(seed))


def mask_of(seed=0, shape=(24, 5)):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4


# -- any set of pairs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_set_is_a_set_of_the_patched_whole(backend):
    model, tokens, mask = tiny(), ids(7), mask_of()
    place = at.ssm_state(layer=1, pos=3)
    old, donor = (run(model, t, record=[place])[place] for t in (tokens, ids(7, seed=1)))
    whole = run(model, tokens, Set(place, torch.where(mask, donor, old)), [STATE], backend)
    parts = run(model, tokens, set_where(place, mask, donor), [STATE, place], backend)
    assert torch.equal(parts[place][:, mask], donor[:, mask])
    assert_close(parts[STATE], whole[STATE], rtol=1e-12, atol=1e-13)
    assert_close(parts.logits, whole.logits, rtol=1e-12, atol=1e-12)
    number = run(model, tokens, set_where(place, mask, 2.5), [place], backend)[place]
    assert (number[:, mask] == 2.5).all() and torch.equal(number[:, ~mask], parts[place][:, ~mask])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_and_everything_are_sets_too(backend):
    model, tokens = tiny(), ids(7)
    clean = run(model, tokens, backend="reference").logits
    none, every = torch.zeros(24, 5, dtype=torch.bool), torch.ones(24, 5, dtype=torch.bool)
    for edits in (ablate(STATE, mask=none), set_where(STATE, none, 3.0), freeze(1, mask=none), forget(1, mask=none)):
        assert_close(run(model, tokens, edits, backend=backend).logits, clean, rtol=1e-12, atol=1e-12)
    dims, channels = torch.zeros(24, 5, dtype=torch.bool), torch.zeros(24, 5, dtype=torch.bool)
    dims[:, [0, 4]], channels[[3, 9]] = True, True
    pairs = [
        (ablate(STATE, mask=every), ablate(STATE)),
        (forget(1, mask=every), forget(1)),
        (freeze(1, mask=every), freeze(1)),
        (freeze(1, 2, mask=every), freeze(1, 2)),
        (freeze(1, mask=dims), freeze(1, n=[4, 0])),
        (freeze(1, mask=channels), freeze(1, e=[3, 9])),
    ]
    for one, two in pairs:
        a, b = (run(model, tokens, e, [STATE], backend) for e in (one, two))
        assert_close(a[STATE], b[STATE], rtol=1e-12, atol=1e-13)
        assert_close(a.logits, b.logits, rtol=1e-12, atol=1e-12)


def test_the_bands_of_a_layer_together_are_its_state():
    model, tokens = tiny(), ids(7)
    both = [e for band in decay_bands(model, 1, 3) for e in ablate(at.state_read(layer=1), mask=band)]
    assert_close(run(model, tokens, both).logits, run(model, tokens, ablate(at.y(layer=1))).logits)
    y = at.y(layer=1)
    clean = run(model, tokens, record=[y])[y]
    keep_one = [clean - run(model, tokens, ablate(at.state_read(layer=1), mask=band), [y])[y]
                for band in decay_bands(model, 1, 3)]  # fmt: skip
    assert_close(sum(keep_one), clean)  # y is linear in what it reads


# -- freeze and forget ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_while_frozen_the_state_stands_still(backend):
    model, tokens = tiny(), ids(9)
    h = run(model, tokens, freeze(1, slice(3, 6)), [STATE], backend)[STATE]
    clean = run(model, tokens, record=[STATE], backend=backend)[STATE]
    assert torch.equal(h[:, :3], clean[:, :3]) and (h[:, 3:6] == h[:, 2:3]).all()
    assert (h[:, 6] != h[:, 2]).any()
    never = run(model, tokens, freeze(1), [STATE, at.y(layer=1), at.ssm_out(layer=1), at.skip(layer=1)], backend)
    assert not never[STATE].any() and not never[at.y(layer=1)].any()
    assert torch.equal(never[at.ssm_out(layer=1)], never[at.skip(layer=1)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_pairs_stand_still_and_the_others_go_on(backend):
    model, tokens, mask = tiny(), ids(9), mask_of()
    h = run(model, tokens, freeze(1, [3, 4], mask=mask), [STATE], backend)[STATE]
    clean = run(model, tokens, record=[STATE], backend=backend)[STATE]
    assert (h[:, 3:5, mask] == clean[:, 2:3, mask]).all()
    assert_close(h[:, :, ~mask], clean[:, :, ~mask], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_after_forgetting_the_state_is_what_this_token_wrote(backend):
    model, tokens, mask = tiny(), ids(9), mask_of()
    write = at.state_write(layer=1)
    out = run(model, tokens, forget(1, 4), [STATE, write], backend)
    assert torch.equal(out[STATE][:, 4], out[write][:, 4])
    some = run(model, tokens, forget(1, 4, mask=mask), [STATE], backend)[STATE]
    clean = run(model, tokens, record=[STATE], backend=backend)[STATE]
    assert torch.equal(some[:, 4, mask], out[write][:, 4, mask])
    assert_close(some[:, 4, ~mask], clean[:, 4, ~mask], rtol=1e-13, atol=1e-15)
    fresh = run(model, tokens[:, 4:], record=[STATE])[STATE]  # all layers forget, state and conv: a new start
    every = [*forget(slice(None), 4), *ablate(at.conv_state(pos=3))]
    assert_close(run(model, tokens, every, [STATE], backend)[STATE][:, 4:], fresh, rtol=1e-10, atol=1e-12)


# -- where the values come from ---------------------------------------------------------------------------------------


def test_no_row_keeps_its_value_when_rows_are_resampled():
    for b in (2, 3, 7, 63):
        orders = [derangement(b, seed) for seed in range(20)]
        for order in orders:
            assert torch.equal(order.sort().values, torch.arange(b)) and not (order == torch.arange(b)).any()
        assert torch.equal(derangement(b, 5), orders[5])
    assert {tuple(derangement(3, s).tolist()) for s in range(20)} == {(1, 2, 0), (2, 0, 1)}  # all there are
    with pytest.raises(EditError, match="no other"):
        derangement(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "place", [at.ssm_state(layer=1, pos=-1), at.u(layer=[2, 0], pos=slice(2)), at.dt(layer=1, pos=2, e=4)]
)
def test_resampling_gives_each_row_the_value_of_another(place, backend):
    model, tokens = tiny(), ids(7)
    values = run(model, tokens, record=[place])[place]
    got = run(model, tokens, ablate(place, "resample", values=values, seed=1), [place], backend)[place]
    axis = 0 if isinstance(place.layer, int) else 1
    assert torch.equal(got, values.index_select(axis, derangement(3, 1)))
    same = tokens[:1].expand(3, 7)  # among equal rows it changes nothing
    twin = run(model, same, record=[place])[place]
    edits = ablate(place, "resample", values=twin)
    assert_close(run(model, same, edits, backend=backend).logits, run(model, same).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mean_over_batches_is_that_over_all_their_tokens(backend):
    model, tokens = tiny(), ids(7, b=5)
    lengths = torch.tensor([7, 4, 6, 7, 2])
    batches = [(tokens[:2], lengths[:2]), (tokens[2:], lengths[2:])]
    alone = [run(model, tokens[i : i + 1, : lengths[i]], record=[STATE])[STATE][0] for i in range(5)]
    mean = mean_of(model, batches, STATE, backend=backend, progress=False)
    assert mean.shape == (1, 1, 24, 5)
    assert_close(mean[0, 0], torch.cat(alone).mean(0))
    by_position = mean_of(model, batches, STATE, backend=backend, progress=False, by_position=True)
    assert by_position.shape == (1, 7, 24, 5)
    for t in range(7):
        assert_close(by_position[0, t], torch.stack([h[t] for h in alone if len(h) > t]).mean(0))
    for made in (mean, by_position):
        got = run(model, tokens, ablate(STATE, "mean", values=made), [STATE], backend)[STATE]
        assert torch.equal(got, made.expand(5, 7, 24, 5))


@pytest.mark.parametrize(
    "place", [at.resid_pre(layer=[0, 2], pos=[1, 3]), at.ssm_state(pos=-1), at.embed(), at.dt(layer=1, pos=1, e=2)]
)
def test_a_mean_fits_the_place_that_it_is_of(place):
    model, tokens = tiny(), ids(7)
    for by_position in (False, True):
        mean = mean_of(model, [tokens[:2], tokens[2:]], place, progress=False, by_position=by_position)
        values = run(model, tokens, record=[place])[place]
        got = run(model, tokens, ablate(place, "mean", values=mean), [place])[place]
        assert torch.equal(got, mean.expand_as(values))
        lead = values.dim() - len([f for f in place.features if not isinstance(f, int)])
        axis = 0 if place.layer is None or isinstance(place.layer, int) else 1
        over = list(range(axis, lead)) if not by_position else [axis]
        assert_close(mean, values.mean(over, keepdim=True))


def test_the_mean_over_a_set_of_pairs():
    model, tokens, mask = tiny(), ids(7), mask_of()
    mean = mean_of(model, [tokens], STATE, progress=False)
    h = run(model, tokens, ablate(STATE, "mean", values=mean, mask=mask), [STATE])[STATE]
    assert torch.equal(h[..., mask], mean[..., mask].expand(3, 7, int(mask.sum())))
    assert ablate(STATE, "mean") == [Mean(STATE)]


def test_a_mean_over_what_a_data_loader_gives():
    """It gives its tensors in a list, also one alone."""
    model, tokens, lengths = tiny(), ids(7, b=5), torch.tensor([7, 2, 5, 1, 6])
    for tensors, batch in (((tokens,), tokens), ((tokens, lengths), (tokens, lengths))):
        loader = DataLoader(TensorDataset(*tensors), batch_size=2)
        assert_close(mean_of(model, loader, STATE, progress=False), mean_of(model, [batch], STATE, progress=False))
    rows = torch.cat([run(model, tokens[i : i + 1, :n], record=[STATE])[STATE][0] for i, n in enumerate(lengths)])
    assert_close(mean_of(model, loader, STATE, progress=False)[0, 0], rows.mean(0))
    assert_close(mean_of(model, [tokens.tolist()], STATE, progress=False), mean_of(model, [tokens], STATE))


# -- planted circuits -------------------------------------------------------------------------------------------------

CIRCUITS = [(name, seed) for name in ("accumulator", "latch", "recall", "two") for seed in range(2)]


def circuit(name, seed):
    """A planted model, its layer, the mask of its state coordinates, and the metric under edits."""
    known = plant(name, seed)
    mask = torch.zeros(known.model.config.d_inner, known.model.config.d_state, dtype=torch.bool)
    for _, e, n in known.truth.coordinates:
        mask[e, n] = True

    def answer(edits, backend="torch"):
        with torch.no_grad():
            return known.metric(run(known.model, known.ids, edits, backend=backend).logits)

    return known, known.truth.layer, mask, answer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "seed"), CIRCUITS)
def test_the_circuit_is_in_its_coordinates_and_nowhere_else(name, seed, backend):
    known, layer, mask, answer = circuit(name, seed)
    true = known.answer(known.ids)
    state = at.ssm_state(layer=layer)
    others = [i for i in range(known.model.config.n_layer) if i != layer]
    for miss in (ablate(state, mask=~mask), freeze(layer, mask=~mask), forget(layer, mask=~mask), freeze(others),
                 ablate(at.ssm_state(layer=others))):  # fmt: skip
        assert_close(answer(miss, backend), true, rtol=0, atol=1e-6)
    nothing = true - known.truth.contributions.sum(1)
    assert known.truth.contributions.sum(1).abs().max() > 0.5
    for hit in (ablate(state, mask=mask), freeze(layer, mask=mask), ablate(at.state_read(layer=layer), mask=mask)):
        assert_close(answer(hit, backend), nothing, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "seed"), CIRCUITS)
@pytest.mark.parametrize("pos", [4, 8, -1])
def test_what_is_forgotten_is_what_was_written_before(name, seed, pos, backend):
    known, layer, mask, answer = circuit(name, seed)
    before = known.truth.contributions[:, :pos].sum(1)
    true = known.answer(known.ids)
    assert_close(answer(forget(layer, pos, mask=mask), backend), true - before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "seed"), [c for c in CIRCUITS if c[0] != "latch"])
@pytest.mark.parametrize("pos", [4, 8])
def test_a_frozen_token_writes_nothing_and_nothing_fades(name, seed, pos, backend):
    known, layer, mask, answer = circuit(name, seed)
    lives = {*known.truth.half_life.values()}
    fade = 0.5 ** (1 / lives.pop())
    parts = known.truth.contributions
    left = parts[:, :pos].sum(1) / fade + parts[:, pos + 1 :].sum(1)
    true = known.answer(known.ids) - parts.sum(1) + left
    assert_close(answer(freeze(layer, pos, mask=mask), backend), true, rtol=0, atol=1e-6)


def test_ablations_go_on_while_generating_and_are_saved(tmp_path):
    model, tokens, mask = tiny(), ids(4), mask_of()
    edits = [*freeze(0, slice(3, None), mask=mask), *forget(2, 5), *ablate(at.ssm_state(layer=1, pos=4), mask=mask)]
    out = generate(model, tokens, 4, edits=edits)
    again = run(model, out.ids[:, :-1], edits)
    assert_close(out.logits, again.logits, rtol=1e-11, atol=1e-11)
    save_edits(edits, tmp_path)
    assert load_edits(tmp_path) == edits


def test_what_has_no_meaning_says_so():
    model, tokens = tiny(), ids(7)
    with pytest.raises(EditError, match="how="):
        ablate(STATE, "noise")
    with pytest.raises(EditError, match="takes no values"):
        ablate(STATE, values=torch.zeros(3, 7, 24, 5))
    for how in ("resample", "mean"):
        with pytest.raises(EditError, match="needs values"):
            ablate(STATE, how, mask=mask_of())
    with pytest.raises(EditError, match="bool tensor"):
        set_where(STATE, mask_of().float(), 1.0)
    with pytest.raises(ShapeMismatch):
        run(model, tokens, ablate(STATE, mask=mask_of(shape=(5, 24))))
    with pytest.raises(InputError, match="empty"):
        mean_of(model, [], STATE, progress=False)
    with pytest.raises(InputError, match=r"mean_of\(model, \[ids\]"):
        mean_of(model, tokens, STATE, progress=False)
    with pytest.raises(InputError, match="3 tensors"):
        mean_of(model, [[tokens, tokens, tokens]], STATE, progress=False)
    with pytest.raises(InputError, match="by_position"):
        mean_of(model, [tokens, tokens[:, :4]], STATE, by_position=True, progress=False)
    steps = at.embed(pos=slice(-4, None, 2))  # -4 and -2 of a row of 7, -3 and -1 of one of 3
    with pytest.raises(InputError, match=r"the positions \[-3, -1\], before \[-4, -2\]"):
        mean_of(model, [tokens, tokens[:, :3]], steps, by_position=True, progress=False)
    place = at.ssm_state(layer=1, pos=slice(2, None))
    ragged = run(model, tokens, record=[place], lengths=[7, 4, 5])[place]
    with pytest.raises(EditError, match="positions that all rows have"):  # nan_to_num would write zeros there
        ablate(place, "resample", values=ragged)

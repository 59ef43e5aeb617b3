"""Lenses: their parts sum to the logit, and each part is what goes when the model runs without it."""

import weakref
from dataclasses import replace

import pytest
import torch
from helpers import draw, names_drawn, tiny
from torch.testing import assert_close

from analyses.planted import plant
from interp import Add, Set, Zero, at, gradients, run
from interp.lens import direct_logit, logit_lens, state_lens
from interp.plots import lens_map, parts_bars, state_map
from minimal_mamba.errors import AddressError, EditError, InputError

BACKENDS = ["reference", "torch"]
ANSWER, FOIL = torch.tensor([3, 7]), torch.tensor([11, 2])


def ids(l, b=2, seed=0):
    return torch.randint(29, (b, l), generator=torch.Generator().manual_seed(seed))


def norms(model, tokens, edits=(), pos=-1):
    """What the last norm divides by, (b,)."""
    place = at.resid_post(layer=-1, pos=pos)
    return (run(model, tokens, edits, [place])[place].square().mean(-1) + model.config.norm_eps).sqrt()


def without(model, tokens, removed, layer, pos=-1):
    """The logit difference at `pos` when something is removed, later layers and the last norm's denominator held."""
    later = [at.mixer_out(layer=i, pos=pos) for i in range(layer + 1, model.config.n_layer)]
    clean = run(model, tokens, record=later)
    edits = [removed, *(Set(a, clean[a]) for a in later)]
    logits = run(model, tokens, edits).logits[:, pos]
    rows = torch.arange(len(tokens))
    diff = logits[rows, ANSWER] - logits[rows, FOIL]
    return diff * norms(model, tokens, edits, pos) / norms(model, tokens, pos=pos)


# -- logit lens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_lens_at_a_layer_is_the_model_cut_there(backend):
    model, tokens = tiny(), ids(7)
    lens = logit_lens(model, tokens, backend=backend)
    assert lens.shape == (4, 2, 7, 32)
    assert_close(lens[-1], run(model, tokens).logits, rtol=1e-12, atol=1e-12)
    nothing = model.lm_head(model.backbone.norm_f(model.backbone.embedding(tokens)))
    assert_close(lens[0], nothing, rtol=1e-12, atol=1e-12)
    for i in (1, 2):
        cut = tiny(n_layer=i)
        kept = {k: v for k, v in model.state_dict().items() if k in cut.state_dict()}
        cut.load_state_dict(kept)
        assert_close(lens[i], cut(tokens).logits, rtol=1e-12, atol=1e-12)


def test_the_lens_holds_the_scores_of_a_layer_or_two_beside_what_it_returns():
    model, made, alive = tiny(), [], []

    def count(_, __, scores):
        alive.append(sum(one() is not None for one in made))
        made.append(weakref.ref(scores))

    handle = model.lm_head.register_forward_hook(count)
    logit_lens(model, ids(7))
    handle.remove()
    assert len(made) > 3 and max(alive) <= 2


def test_the_lens_of_chosen_tokens_makes_no_other_column_of_the_head():
    model, tokens, whole = tiny(), ids(7), []
    handle = model.lm_head.register_forward_hook(lambda *_: whole.append(1))
    full = logit_lens(model, tokens)
    assert len(whole) == 5  # the run's last position; the stream before each layer and after the last
    for chosen, pos in (([4, 9, 4], slice(None)), ([[1, 28], [0, 2]], slice(2, 5)), ([[5], [6]], 3)):
        whole.clear()
        some = logit_lens(model, tokens, chosen, pos=pos)
        assert len(whole) == 1
        for row, of in enumerate(chosen if isinstance(chosen[0], list) else [chosen] * 2):
            assert_close(some[:, row], full[:, row, pos][..., of], rtol=1e-12, atol=1e-12)
    handle.remove()


def test_the_lens_keeps_chosen_tokens_and_positions():
    model, tokens = tiny(), ids(7)
    full = logit_lens(model, tokens)
    assert_close(logit_lens(model, tokens, [4, 9, 4], pos=3), full[:, :, 3][..., [4, 9, 4]])
    assert_close(logit_lens(model, tokens[:1], [4], pos=3), full[:, :1, 3][..., [4]])
    with pytest.raises(InputError, match=r"as many as there are rows: one a row is \(2, 1\)"):
        logit_lens(model, tokens, ANSWER)
    pairs = torch.stack([ANSWER, FOIL], 1)  # (b, 2): each row its own
    mine = logit_lens(model, tokens, pairs, pos=slice(2, 5))
    assert mine.shape == (4, 2, 3, 2)
    for b in range(2):
        assert_close(mine[:, b], full[:, b, 2:5][..., pairs[b]])
    probs = logit_lens(model, tokens, log_probs=True)
    assert_close(probs, full[..., :29].log_softmax(-1))  # the embedding's padding is no token


def test_the_lens_of_a_padded_row_is_the_row_alone():
    model, tokens = tiny(), ids(7)
    lens = logit_lens(model, tokens, lengths=[7, 4])
    assert_close(lens[:, 1:, :4], logit_lens(model, tokens[1:, :4]), rtol=1e-12, atol=1e-12)
    assert lens[:, 1, 4:].isnan().all()
    assert_close(logit_lens(model, tokens, lengths=[7, 4], pos=-1)[:, 1], lens[:, 1, 3])


def test_the_lens_sees_edits_of_the_stream_and_refuses_those_behind_it():
    model, tokens = tiny(), ids(7)
    edit = Add(at.resid_pre(layer=1, pos=3), torch.ones(12, dtype=torch.float64))
    seen = logit_lens(model, tokens, edits=edit)
    assert_close(seen[-1], run(model, tokens, edit).logits)
    assert torch.equal(seen[0], logit_lens(model, tokens)[0]) and (seen[1, :, 3] != seen[0, :, 3]).all()
    for place in (at.final_norm(), at.logits()):
        with pytest.raises(EditError, match="Leave it out"):
            logit_lens(model, tokens, edits=[Zero(place)])


# -- direct logit attribution -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pos", [-1, 3])
def test_a_part_is_what_goes_when_the_model_runs_without_it(pos, backend):
    model, tokens = tiny(bias=True), ids(7)
    found = direct_logit(model, tokens, ANSWER, FOIL, pos=pos, backend=backend)
    for i in range(3):
        for part, site in ((found.read, at.y), (found.skip, at.skip)):
            gone = without(model, tokens, Zero(site(layer=i, pos=pos)), i, pos)
            assert_close(part[i], found.logit - gone, rtol=1e-9, atol=1e-10)
        gone = without(model, tokens, Zero(at.mixer_out(layer=i, pos=pos)), i, pos)
        assert_close((found.read + found.skip + found.bias)[i], found.logit - gone, rtol=1e-9, atol=1e-10)
    nothing = [Set(at.mixer_out(layer=i, pos=pos), run(model, tokens, record=[a])[a]) for i in range(3)
               for a in [at.mixer_out(layer=i, pos=pos)]]  # fmt: skip
    edits = [*nothing, Zero(at.embed(pos=pos))]
    logits, rows = run(model, tokens, edits).logits[:, pos], torch.arange(2)
    gone = (
        (logits[rows, ANSWER] - logits[rows, FOIL]) * norms(model, tokens, edits, pos) / norms(model, tokens, pos=pos)
    )
    assert_close(found.embed, found.logit - gone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("sizes", [{}, {"bias": True}, {"rms_norm": False}, {"rms_norm": False, "bias": True}])
@pytest.mark.parametrize("l", [1, 2, 7, 63])
def test_the_parts_sum_to_the_logit_and_nothing_is_left_over(l, sizes):
    model, tokens = tiny(**sizes), ids(l)
    found = direct_logit(model, tokens, ANSWER)
    assert_close(found.logit, run(model, tokens).logits[torch.arange(2), -1, ANSWER], rtol=0, atol=1e-12)
    assert_close(found.total(), found.logit, rtol=0, atol=1e-10)
    assert found.rest.abs().max() < 1e-10  # the remainder is rounding alone
    assert bool(found.bias.any()) == ("bias" in sizes) and bool(found.norm_bias.any()) == ("rms_norm" in sizes)
    assert found.read.abs().min() > 1e-4


def test_a_direction_in_vocabulary_is_a_target_too():
    model, tokens = tiny(), ids(7)
    direction = torch.zeros(2, 32, dtype=torch.float64)
    direction[torch.arange(2), ANSWER] += 1
    direction[torch.arange(2), FOIL] -= 1
    one, two = direct_logit(model, tokens, direction), direct_logit(model, tokens, ANSWER, FOIL)
    assert_close(one.read, two.read)
    assert_close(one.logit, two.logit)
    a, f = direct_logit(model, tokens, 3), direct_logit(model, tokens, 11)
    both = direct_logit(model, tokens, 3, 11)
    assert_close(a.skip - f.skip, both.skip)
    assert_close(direct_logit(model, tokens, direction[0]).logit[0], two.logit[0])


def test_what_an_edit_adds_to_the_stream_is_the_remainder():
    model, tokens = tiny(), ids(7)
    push = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    edit = Add(at.resid_post(layer=1, pos=-1), push)
    found = direct_logit(model, tokens, ANSWER, FOIL, edits=edit)
    head = (model.lm_head.weight[ANSWER] - model.lm_head.weight[FOIL]) * model.backbone.norm_f.weight
    assert_close(found.rest, head @ push / norms(model, tokens, [edit]), rtol=1e-9, atol=1e-10)
    assert_close(found.logit, direct_logit(model, tokens, ANSWER, FOIL, edits=[edit]).total())


# -- state lens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pos", [-1, 4])
def test_a_state_part_is_what_goes_when_its_write_is_zeroed(pos, backend):
    model, tokens = tiny(), ids(7)
    lens = state_lens(model, tokens, ANSWER, FOIL, by=("pos", "e", "n"), pos=pos, backend=backend)
    assert lens.values.shape == (3, 2, 7, 24, 5)
    rng = torch.Generator().manual_seed(0)
    for _ in range(12):
        layer, s, e, n = (int(torch.randint(high, (1,), generator=rng)) for high in (3, 5, 24, 5))
        gone = without(model, tokens, Zero(at.state_write(layer=layer, pos=s, e=e, n=n)), layer, pos)
        assert_close(lens.values[layer, :, s, e, n], lens.logit - gone, rtol=1e-7, atol=1e-10)
    if pos == 4:
        assert not lens.values[:, :, 5:].any()
    assert_close(lens.total(), lens.logit, rtol=0, atol=1e-10)


@pytest.mark.parametrize("l", [1, 2, 7, 63])
def test_parts_and_remainder_sum_to_the_logit_however_they_are_told_apart(l):
    model, tokens = tiny(rms_norm=False, bias=True), ids(l)
    full = state_lens(model, tokens, ANSWER, FOIL, by=("n", "pos", "e"))
    assert full.by == ("pos", "e", "n")
    for by in ("n", ("e",), ("pos",), ("pos", "n"), ("e", "n"), ("e", "pos"), ()):
        lens = state_lens(model, tokens, ANSWER, FOIL, by=by)
        named = (by,) if isinstance(by, str) else by
        summed = [2 + i for i, a in enumerate(("pos", "e", "n")) if a not in named]
        assert_close(lens.values, full.values.sum(summed) if summed else full.values, rtol=0, atol=1e-11)
        assert_close(lens.total(), lens.logit, rtol=0, atol=1e-10)
    read = full.values.sum((2, 3, 4))
    assert_close(read, full.direct.read, rtol=0, atol=1e-11)  # two ways to the same number: y, and the writes
    assert not full.initial.any() and read.abs().min() > 1e-4


def test_a_carried_state_is_a_term_of_its_own():
    model, tokens = tiny(), ids(9)
    whole = state_lens(model, tokens, ANSWER, FOIL, by=("pos", "e", "n"))
    before = run(model, tokens[:, :4], keep_state=True).state
    for pos in (-1, 8):  # positions go on counting from where the state stood
        rest = state_lens(model, tokens[:, 4:], ANSWER, FOIL, by=("pos", "e", "n"), state=before, pos=pos)
        assert_close(rest.values, whole.values[:, :, 4:], rtol=1e-9, atol=1e-12)
        assert_close(rest.initial, whole.values[:, :, :4].sum(2), rtol=1e-9, atol=1e-12)
        assert_close(rest.total(), whole.logit, rtol=0, atol=1e-10)
    with pytest.raises(AddressError):
        state_lens(model, tokens[:, 4:], ANSWER, state=before, pos=2)


@pytest.mark.parametrize("pos", [-1, -3, 2])
def test_a_padded_row_has_the_parts_that_it_has_alone(pos):
    model, tokens = tiny(), ids(7)
    both = state_lens(model, tokens, ANSWER, FOIL, by=("pos", "n"), lengths=[7, 4], pos=pos)
    alone = state_lens(model, tokens[1:, :4], ANSWER[1:], FOIL[1:], by=("pos", "n"), pos=pos)
    assert_close(both.values[:, 1:, :4], alone.values, rtol=0, atol=1e-12)
    assert not both.values[:, 1, 4:].any()
    assert_close(both.rest[1:], alone.rest, rtol=0, atol=1e-12)
    assert_close(both.total(), both.logit, rtol=0, atol=1e-10)
    first = direct_logit(model, tokens, ANSWER, FOIL, lengths=[7, 4], pos=pos)
    assert_close(first.read, both.values.sum((2, 3)), rtol=0, atol=1e-11)


def test_layers_are_chosen_and_the_others_are_in_the_remainder():
    model, tokens = tiny(), ids(7)
    full = state_lens(model, tokens, ANSWER, by="e")
    some = state_lens(model, tokens, ANSWER, by="e", layers=[-1, 0])
    assert some.layers == (2, 0) and torch.equal(some.values, full.values[[2, 0]])
    assert_close(some.rest, full.rest + full.direct.read[1])
    assert_close(some.total(), some.logit, rtol=0, atol=1e-10)


def test_edits_before_the_recurrence_count_and_those_inside_are_refused():
    model, tokens = tiny(), ids(7)
    stopped = state_lens(model, tokens, ANSWER, by=("pos",), edits=Set(at.dt(layer=1, pos=2), 0.0))
    assert not stopped.values[1, :, 2].any() and stopped.values[1, :, 1].all()
    assert_close(stopped.total(), stopped.logit, rtol=0, atol=1e-10)
    inside = Zero(at.ssm_state(layer=1, pos=2))
    for edit in (inside, Zero(at.y(layer=1)), Zero(at.decay()), Zero(at.recurrent_state(layer=[0, -2], pos=1))):
        with pytest.raises(EditError, match="take other layers"):
            state_lens(model, tokens, ANSWER, edits=[edit])
    others = state_lens(model, tokens, ANSWER, edits=[inside], layers=[0, 2])
    assert_close(others.total(), others.logit, rtol=0, atol=1e-10)


def test_a_float32_model_has_the_same_parts_to_its_precision():
    exact = state_lens(tiny(), ids(63), ANSWER, FOIL, by=("pos", "n"))
    found = state_lens(tiny(dtype=torch.float32), ids(63), ANSWER, FOIL, by=("pos", "n"))
    assert found.values.dtype == torch.float32
    assert_close(found.values.double(), exact.values, rtol=1e-3, atol=1e-4)
    assert_close(found.total(), found.logit, rtol=0, atol=1e-4)


def test_a_bfloat16_model_is_taken_apart_up_to_its_rounding():
    model, tokens = tiny(dtype=torch.bfloat16), ids(31)
    lens = state_lens(model, tokens, ANSWER, FOIL, by=("pos", "n"))
    assert lens.values.dtype == torch.float32
    assert_close(lens.values.sum((2, 3)), lens.direct.read, rtol=0, atol=1e-5)
    assert_close(lens.total(), lens.logit, rtol=0, atol=1e-5)
    assert lens.direct.rest.abs().max() < 0.1 < lens.direct.read.abs().max()  # `gated` is rounded, and so is the stream


def test_what_cannot_be_asked_says_so():
    model, tokens = tiny(), ids(7)
    for wrong in (29, -1, torch.tensor([1, 2, 3]), torch.ones(31), torch.tensor([True, False])):
        with pytest.raises(InputError):
            direct_logit(model, tokens, wrong)
    with pytest.raises(InputError, match="has no foil"):
        direct_logit(model, tokens, torch.ones(32), 3)
    for by in (("l",), ("n", "n"), "en"):
        with pytest.raises(InputError, match="by="):
            state_lens(model, tokens, 1, by=by)
    with pytest.raises(InputError, match="tokens"):
        logit_lens(model, tokens, [40])
    with pytest.raises(AddressError):
        direct_logit(model, tokens, 1, pos=7)


# -- planted circuits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["accumulator", "latch", "recall", "two"])
def test_the_lens_finds_what_each_token_wrote_and_where_it_is_kept(name, seed):
    known = plant(name, seed)
    head = at.logits(pos=-1)
    target = gradients(known.model, known.ids, known.metric, [head])[head]  # (b, v): the metric is linear in the logits
    lens = state_lens(known.model, known.ids, target, by=("pos", "e", "n"))
    assert_close(lens.logit, known.answer(known.ids), rtol=0, atol=1e-6)
    found = lens.values[known.truth.layer]
    assert known.truth.contributions.abs().max() > 0.5
    assert_close(found.sum((2, 3)), known.truth.contributions, rtol=0, atol=1e-6)
    for layer, e, n in known.truth.coordinates:
        lens.values[layer, :, :, e, n] = 0
    assert lens.values.abs().max() < 1e-6  # and nothing anywhere else
    direct = lens.direct
    direct.read[known.truth.layer] = 0
    assert max(part.abs().max() for part in (direct.read, direct.skip, direct.bias, direct.rest)) < 1e-6


# -- figures ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def plt():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    yield pyplot
    pyplot.close("all")


def test_the_bars_are_the_means_of_the_parts_and_end_with_their_sum(plt):
    model, tokens = tiny(bias=True), ids(7)
    found = direct_logit(model, tokens, ANSWER, FOIL)
    ax = parts_bars(found)
    names = [t.get_text() for t in ax.get_yticklabels()]
    widths = dict(zip(names, (bar.get_width() for bar in ax.patches), strict=True))
    assert names == ["embed", *(f"{i} {p}" for i in range(3) for p in ("state", "skip", "bias")), "sum"]
    assert widths["1 state"] == pytest.approx(float(found.read[1].mean()))
    assert sum(widths.values()) - widths["sum"] == pytest.approx(widths["sum"])
    assert ax.get_xlabel() == "adds to the logit difference (nats)"
    assert parts_bars(direct_logit(model, tokens, ANSWER)).get_xlabel() == "adds to the logit (nats)"
    centred = torch.eye(model.config.padded_vocab)[ANSWER] - 1 / model.config.padded_vocab
    assert parts_bars(direct_logit(model, tokens, centred)).get_xlabel() == "adds to the sum of logits (nats)"


def test_the_maps_show_layers_upward_and_dimensions_by_position(plt):
    model, tokens = tiny(), ids(7)
    lens = state_lens(model, tokens, ANSWER, FOIL, by=("pos", "n"))
    image = state_map(lens, layer=1, tokens=list("abcdefg")).images[0]
    assert_close(torch.tensor(image.get_array().data), lens.values[1].mean(0).T)
    assert image.get_clim()[0] == -image.get_clim()[1]
    assert_close(torch.tensor(state_map(lens).images[0].get_array().data), lens.values.sum(0).mean(0).T)
    scores = logit_lens(model, tokens, [3])[..., 0].mean(1)
    ax = lens_map(scores, label="logit (nats)")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["embed", "0", "1", "2"]
    assert_close(torch.tensor(ax.images[0].get_array().data), scores)
    for wrong in (lambda: state_map(state_lens(model, tokens, 3)), lambda: state_map(lens, layer=3),
                  lambda: lens_map(scores[0], label=""), lambda: lens_map(scores, label="", tokens=["a"])):  # fmt: skip
        with pytest.raises(InputError):
            wrong()


def test_the_maps_hatch_what_is_not_finite_and_scale_by_the_rest(plt):
    model, tokens = tiny(), ids(7)
    lens = state_lens(model, tokens, ANSWER, FOIL, by=("pos", "n"), layers=1)
    holed = lens.values.clone()
    holed[:, :, 2, 0] = float("nan")
    ax = state_map(replace(lens, values=holed))
    rest = holed[0].mean(0).nan_to_num().abs().max()
    assert ax.images[0].get_clim() == (-rest, rest) and len(ax.collections[0].get_paths()) == 1
    assert "hatched" in ax.figure.axes[1].get_ylabel() and ax.get_title() == "layer 1: no sum, not all is finite"
    image = state_map(replace(lens, values=0 * lens.values)).images[0]
    assert image.cmap(image.norm(0.0)) == image.cmap(0.5)
    ax = lens_map(torch.tensor([[0.0, float("nan")], [2.0, 1.0]]), label="logit (nats)")
    assert ax.images[0].get_clim() == (0, 2) and len(ax.collections[0].get_paths()) == 1
    for flat, ends in ((torch.ones(2, 3), (0.5, 1.5)), (torch.full((2, 3), float("nan")), (0, 1))):
        ax = lens_map(flat, label="x")
        ax.figure.canvas.draw()
        assert ax.images[0].get_clim() == ends
    assert lens_map(torch.tensor([[0.1, 1.2]]), label="p", ends=(0, 1)).images[0].colorbar.extend == "max"
    with pytest.raises(InputError, match="the lower end of the colour scale comes first"):
        lens_map(torch.zeros(2, 3), label="x", ends=(1, 0))


def test_the_map_of_a_deep_model_names_every_token_of_a_short_prompt(plt):
    """Beside names of layers and a colour bar with long numbers, which take a third of the width."""
    tokens = ["When", "Mary", "and", "John", "went", "to", "the", "store", ",", "John", "gave", "a", "drink", *"tom"]
    for label in ("log p(answer) (nats)", "x"):
        ax = lens_map(-20 + 10 * draw(25, 16), label=label, tokens=tokens, ends=(-27.5, -12.5))
        assert names_drawn(ax, "x") == tokens
        assert ax.xaxis.get_major_ticks()[0].label1.get_fontsize() >= 5.5


@pytest.mark.parametrize(("tokens", "least"), [(None, 7), (["$ incomprehensible"] * 64, 16)])
def test_names_that_do_not_fit_the_maps_are_left_out(tokens, least, plt):
    lens = state_lens(tiny(), ids(7), ANSWER, FOIL, by=("pos", "n"), layers=1)
    wide = replace(lens, values=draw(1, 2, 64, 16))
    for ax in (state_map(wide, tokens=tokens), lens_map(draw(49, 64), label="x", tokens=tokens)):
        names = names_drawn(ax, "x")
        assert least <= len(names) < 40 and (tokens is None or names[0] == r"\$ incompreh…")
        assert len(names_drawn(ax, "y")) >= 4

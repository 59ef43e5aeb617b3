"""Steering: directions are the contrast that they came from, and act alike in one pass and token by token."""

from dataclasses import replace

import pytest
import torch
from helpers import tiny
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from analyses.planted import plant
from interp import Add, at, generate, load_edits, logit_diff, run, save_edits
from interp.plots import steering_plot
from interp.steering import Direction, contrast, steering_curve
from minimal_mamba.errors import AddressError, EditError, InputError

BACKENDS = ["reference", "torch"]


def ids(l, b=3, seed=0):
    return torch.randint(29, (b, l), generator=torch.Generator().manual_seed(seed))


def direction(place, size=1.5, seed=0):
    """A direction at a place of `tiny`."""
    sizes = {"d": 12, "e": 24, "n": 5, "r": 4, "k": 3}
    shape = [sizes[a] for a, f in zip(place.spec.features, place.features, strict=True) if not isinstance(f, int)]
    blank = Direction(place, torch.zeros(shape, dtype=torch.float64), size)
    return blank.random(seed)


# -- the direction ----------------------------------------------------------------------------------------------------


def test_a_contrast_is_the_difference_of_the_means():
    model, good, bad = tiny(), ids(7), ids(7, b=5, seed=1)
    place = at.resid_post(layer=1, pos=-1)
    values = [run(model, t, record=[place])[place] for t in (good, bad)]
    found = contrast(place, *values)
    assert_close(found.size * found.vector, values[0].mean(0) - values[1].mean(0))
    assert_close(found.vector.norm(), torch.tensor(1.0, dtype=torch.float64))
    back = contrast(place, *values[::-1])
    assert_close(back.vector, -found.vector)
    assert back.size == found.size


def test_a_contrast_over_positions_counts_real_tokens_only():
    model, good, bad = tiny(), ids(7), ids(7, seed=1)
    place = at.ssm_state(layer=1)
    values = [run(model, t, record=[place], lengths=[7, 4, 5])[place] for t in (good, bad)]
    means = []
    for tokens in (good, bad):
        rows = [run(model, row[None, :l], record=[place])[place][0] for row, l in zip(tokens, (7, 4, 5), strict=True)]
        means.append(torch.cat(rows).mean(0))
    found = contrast(place, *values)
    assert found.vector.shape == (24, 5)
    assert_close(found.size * found.vector, means[0] - means[1])


def test_strength_one_moves_one_mean_onto_the_other():
    model, good, bad = tiny(), ids(7), ids(7, seed=1)
    place = at.resid_post(layer=1, pos=-1)
    values = [run(model, t, record=[place])[place] for t in (good, bad)]
    found = contrast(place, *values)
    moved = run(model, bad, found.add(1.0, pos=-1), [place])[place]
    assert_close(moved.mean(0), values[0].mean(0))
    gone = run(model, bad, found.remove(-1), [place])[place]
    assert_close(gone @ found.vector, torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    assert_close(gone + run(model, bad, found.keep(-1), [place])[place], values[1])


def test_random_controls_are_of_the_same_size_and_repeat():
    found = direction(at.u(layer=2))
    one, two, again = found.random(3), found.random(4), found.random(3)
    assert torch.equal(one.vector, again.vector) and not torch.equal(one.vector, two.vector)
    assert one.size == found.size and one.place == found.place
    assert_close(
        torch.stack([found.random(s).vector for s in range(20)]).norm(dim=1), torch.ones(20, dtype=torch.float64)
    )
    half = Direction(found.place, found.vector.float(), 1.0).random(3)
    assert_close(half.vector, one.vector.float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(3))
def test_a_direction_in_the_planted_state_moves_the_answer_as_far_as_it_says(seed, backend):
    known = plant("accumulator", seed)
    place = at.ssm_state(layer=known.truth.layer, pos=-1)
    with torch.no_grad():
        values = [run(known.model, t, record=[place])[place] for t in (known.donor_ids, known.ids)]
        found = contrast(place, *values)
        base = known.metric(run(known.model, known.ids).logits)
        for strength in (-1.0, 0.5, 2.0):
            edit = found.add(strength, pos=-1)
            moved = known.metric(run(known.model, known.ids, edit, backend=backend).logits) - base
            assert_close(moved, (strength * known.gap.mean()).expand(4), rtol=1e-5, atol=1e-6)


# -- one pass, and token by token -------------------------------------------------------------------------------------

PLACES = [
    at.embed(), at.resid_pre(layer=1), at.resid_post(layer=2), at.mixer_in(layer=0), at.x(layer=1), at.u(layer=2),
    at.B(layer=1), at.C(layer=0), at.ssm_state(layer=1), at.state_read(layer=0), at.conv_state(layer=1),
    at.state_write(layer=2), at.ssm_state(layer=0, n=2), at.gated(layer=2), at.final_norm(),
]  # fmt: skip
SLICES = st.one_of(
    st.builds(slice, st.integers(0, 8), st.none()),  # from the prompt or from what is generated on
    st.builds(slice, st.integers(-3, -1), st.none()),  # from the prompt's end on
    st.builds(slice, st.none(), st.none(), st.integers(1, 3)),
    st.builds(lambda a, n: slice(a, a + n), st.integers(0, 5), st.integers(1, 4)),
    st.integers(0, 8),
)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), backend=st.sampled_from(BACKENDS), padded=st.booleans())
def test_one_pass_over_the_result_equals_token_by_token(data, backend, padded):
    model, prompt, new = tiny(), ids(5), 6
    lengths = torch.tensor([5, 3, 4] if padded else [5, 5, 5])
    kinds = data.draw(st.lists(st.tuples(st.sampled_from(PLACES), SLICES, st.sampled_from(["add", "remove", "keep"])),
                               min_size=1, max_size=3))  # fmt: skip
    for place in {
        p for p, *_ in kinds
    }:  # a direction removed and nothing else kept leaves rounding, which norms blow up
        assume(not {"remove", "keep"} <= {kind for p, _, kind in kinds if p == place})
    edits = []
    for place, pos, kind in kinds:
        if isinstance(pos, slice) and pos.start is not None and pos.start < 0:
            pos = slice(max(pos.start, -int(lengths.min())), None)
        made = direction(place)
        edits.append(made.add(0.7, pos) if kind == "add" else getattr(made, kind)(pos))
    try:
        out = generate(model, prompt, new, edits=edits, lengths=lengths, backend=backend)
    except AddressError:  # a position that not all rows reach
        reach = int(lengths.min()) + new - 1
        assert any((p if isinstance(p, int) else p.start or 0) >= reach for _, p, _ in kinds)
        return
    for b, own in enumerate(lengths.tolist()):
        # negative positions count from the prompt's end: in one pass the same places are named from the start
        def absolute(edit, own=own):
            pos = edit.address.pos
            if not isinstance(pos, int) and pos.start is not None and pos.start < 0:
                return type(pos)(own + pos.start, None, None)
            return pos

        whole = out.ids[b : b + 1, : own + new - 1]
        again = [_moved(e, absolute(e)) for e in edits]
        assert_close(run(model, whole, again, backend=backend).logits[0], out.logits[b, : own + new - 1],
                     rtol=1e-9, atol=1e-10)  # fmt: skip


def _moved(edit, pos):
    return replace(edit, address=replace(edit.address, pos=pos))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_steered_from_the_first_new_token_on_leaves_the_prompt_alone(backend):
    model, prompt = tiny(), ids(5)
    place = at.resid_post(layer=1)
    push = direction(place, size=8.0)
    plain, steered = (generate(model, prompt, 6, e, [place], backend) for e in ((), push.add(1.0, slice(5, None))))
    assert_close(steered.logits[:, :5], plain.logits[:, :5], rtol=0, atol=0)
    assert torch.equal(steered.ids[:, :6], plain.ids[:, :6])  # the first new token was chosen before
    assert not torch.equal(steered.ids, plain.ids)
    assert_close(steered[place][:, :5], plain[place][:, :5], rtol=0, atol=0)
    from_end = generate(model, prompt, 6, push.add(1.0, slice(-1, None)), [place], backend)
    every = generate(model, prompt, 6, push.add(1.0, slice(4, None)), [place], backend)
    assert torch.equal(from_end[place], every[place])
    with pytest.raises(AddressError):  # the last token generated is not run
        generate(model, prompt, 6, push.add(1.0, slice(10, None)), backend=backend)


def test_steering_is_saved(tmp_path):
    push = direction(at.ssm_state(layer=1))
    edits = [push.add(2.0, slice(3, None)), push.remove(), push.keep(4, rows=[1])]
    save_edits(edits, tmp_path)
    assert load_edits(tmp_path) == edits


# -- the curve --------------------------------------------------------------------------------------------------------


def test_the_curve_is_one_run_a_strength_and_direction():
    model, tokens = tiny(), ids(7)
    push = direction(at.resid_post(layer=1))

    def metric(logits):
        return logit_diff(logits, 3, 5)

    for lengths in (None, [7, 4, 5]):
        found = steering_curve(model, tokens, push, metric, [0.0, -1.0, 2.0], pos=slice(2, None), controls=2, seed=7,
                               lengths=lengths, progress=False)  # fmt: skip
        clean = logit_diff(run(model, tokens, lengths=lengths), 3, 5)
        assert_close(found.values[0], clean)
        assert_close(found.controls[:, 0], clean.expand(2, 3))
        one = Add(at.resid_post(layer=1, pos=slice(2, None)), 2 * 1.5 * push.vector)
        assert_close(found.values[2], logit_diff(run(model, tokens, one, lengths=lengths), 3, 5))
        other = push.random(8).add(-1.0, slice(2, None))
        assert_close(found.controls[1, 1], logit_diff(run(model, tokens, other, lengths=lengths), 3, 5))
        assert found.controls.shape == (2, 3, 3)


@pytest.mark.parametrize("lengths", [None, [7, 4, 5]])
@pytest.mark.parametrize("place", [at.resid_post(layer=1), at.ssm_state(layer=2)])
@pytest.mark.parametrize("carried", [False, True])
def test_the_curve_runs_its_cells_together(place, lengths, carried, monkeypatch):
    """It ran the whole model once a strength and direction."""
    model, tokens, forwards = tiny(), ids(7), []
    state = run(model, ids(4, seed=3), keep_state=True).state if carried else None
    push, pos = direction(place), slice(6, None) if carried else slice(2, None)
    strengths, score = [-1.0, 0.5, 2.0], type(model).score
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "score", lambda *args: forwards.append(1) or score(*args))
        found = steering_curve(
            model, tokens, push, lambda x: logit_diff(x, 3, 5), strengths, pos=pos, controls=2, lengths=lengths,
            state=state, progress=False,
        )  # fmt: skip
    assert len(forwards) == (9 if carried else 1)  # the base run of a sweep
    for one, values in zip([push, push.random(0), push.random(1)], [found.values, *found.controls], strict=True):
        for strength, value in zip(strengths, values, strict=True):
            alone = run(model, tokens, one.add(strength, pos), state=state, lengths=lengths)
            assert_close(value, logit_diff(alone, 3, 5), rtol=1e-9, atol=1e-10)


def test_what_has_no_meaning_says_so():
    model, tokens = tiny(), ids(7)
    place = at.resid_post(layer=1, pos=-1)
    values = run(model, tokens, record=[place])[place]
    with pytest.raises(InputError, match="no direction between them"):
        contrast(place, values, values)
    with pytest.raises(EditError, match="one layer"):
        contrast(at.resid_post(pos=-1), values, values)
    with pytest.raises(EditError, match="feature axis"):
        contrast(at.u(layer=1, pos=-1, e=3), values, values)
    with pytest.raises(InputError, match="records 2 axes"):
        contrast(place, values[:, None], values)
    with pytest.raises(InputError, match="at least one finite strength"):
        steering_curve(model, tokens, direction(place), lambda x: x[:, -1, 0], [], progress=False)


def test_the_plot_shows_the_direction_and_the_band_of_its_controls():
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    model, tokens = tiny(), ids(7)
    curve = steering_curve(
        model, tokens, direction(at.resid_post(layer=1)), lambda x: x[:, -1, 0], [-1.0, 1.0], controls=3, progress=False
    )
    ax = steering_plot(curve, label="logit (nats)")
    controls, values = ax.lines[0].get_ydata(), ax.lines[1].get_ydata()
    assert_close(torch.tensor(values), curve.values.mean(1))
    assert_close(torch.tensor(controls), curve.controls.mean((0, 2)))
    mixed = replace(curve, strengths=curve.strengths.flip(0), values=curve.values.flip(0),
                    controls=curve.controls.flip(1)[:1])  # fmt: skip
    ax = steering_plot(mixed, label="logit (nats)")
    assert ax.get_ylabel() == "logit (nats)"
    for line, drawn in zip(ax.lines, (curve.controls[0].mean(-1), curve.values.mean(1)), strict=False):
        assert line.get_xdata().tolist() == [-1, 1]
        assert_close(torch.tensor(line.get_ydata()), drawn)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["1 random direction", "direction"]
    plt.close("all")

"""Alignment: planted subspaces are found, controls are at chance, and what comes back are exact edits."""

import itertools
import math
from dataclasses import replace
from functools import cache

import matplotlib.pyplot as plt
import pytest
import torch
from helpers import draw, near, slow, tiny
from torch.testing import assert_close

from analyses.planted.build import Bench
from interp import Add, Project, Scale, Set, Swapped, accuracy, align, alignment_curve, at, generate, log_prob, run
from interp.swaps import Pairs, most_varying, principal_axes, span_of
from minimal_mamba.errors import AddressError, EditError, InputError

SEEDS = pytest.mark.parametrize("seed", [0, *slow(1, 2)])
GAIN = 3.0  # of a right answer's logit over one that is wrong in one part: 2 GAIN


def ids(l, b=3, seed=0):
    return torch.randint(29, (b, l), generator=torch.Generator().manual_seed(seed))


@cache
def planted(seed=0, small=None):
    """Three bits, each along a direction of its own of a state; the answer names all three.

    A token writes an orthonormal direction of eight channels, of which three are read: the hidden value is the first
    two, and the third is to stay the base's. What else is written is never read.

    Args:
        small: the second bit, and others that are not read, lie in channels of their own, whose states are so small.
    Returns:
        model, ids, donor_ids, targets (of the donor's first two bits and the base's third), place, directions (3, e)
    """
    bench, rate, l, b, level = Bench(seed), 0.05, 6, 300, 1.0
    layer, bits, others = bench.layer, bench.tokens[:6], bench.tokens[6:11]
    turn = torch.linalg.qr(draw(8, 8, seed=seed))[0]  # a direction a column
    if small is not None:
        turn = torch.block_diag(*(torch.linalg.qr(draw(4, 4, seed=seed + i))[0] for i in (0, 1)))
        turn = turn[:, [0, 4, 1, 2, 5, 3, 6, 7]]
    sizes = [1.0 if small is None or c < 4 else small for c in range(8)]
    writes = {bits[2 * i + 1]: turn[:, i] for i in range(3)} | {t: turn[:, 3 + i] for i, t in enumerate(others)}
    e = []
    for c, size in enumerate(sizes):
        values = {t: level + (float(writes[t][c]) if t in writes else 0.0) for t in bench.tokens}
        e.append(bench.channel(layer, values, dt=size, rate=rate / size))
    always, n = bench.channel(layer, 1.0), bench.dimension(layer)
    bench.connect(layer, n, B={always: 0.1}, C={always: 10.0})
    model = bench.finish({})
    codes = torch.tensor(list(itertools.product((0, 1), repeat=3)))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        for i in range(3):
            model.backbone.layers[layer].mixer.out_proj.weight[bench.out[i], e] = turn[:, i] / torch.tensor(sizes)
            kept = math.exp(-rate * (l - 1 - i))
            same = level * float(turn[:, i].sum()) * sum(math.exp(-rate * t) for t in range(l))
            for token, code in zip(bench.tokens, codes.tolist(), strict=False):
                model.lm_head.weight[token, bench.out[i]] = 2 * GAIN * (2 * code[i] - 1) / kept
                model.lm_head.weight[token, bench.one] -= GAIN * (2 * code[i] - 1) * (1 + 2 * same / kept)
    rng = torch.Generator().manual_seed(seed)
    drawn = torch.randint(2, (2, b, 3), generator=rng)
    prompts = torch.tensor(others)[torch.randint(len(others), (2, b, l), generator=rng)]
    prompts[..., :3] = torch.tensor(bits).reshape(3, 2)[torch.arange(3), drawn]
    answers, place = torch.tensor(bench.tokens[:8]), at.ssm_state(layer=layer, pos=3, e=e, n=n)
    four = torch.tensor([4, 2, 1])
    assert (run(model, prompts[0]).last_logits.argmax(-1) == answers[drawn[0] @ four]).all()
    targets = answers[torch.cat([drawn[1, :, :2], drawn[0, :, 2:]], 1) @ four]
    return model, prompts[0], prompts[1], targets, place, turn[:, :3].T


@cache
def found(seed=0, k=2, small=None):
    model, base, donor, targets, place, _ = planted(seed, small)
    return align(model, base, donor, targets, place, k, seed=seed, scale=small is not None, progress=False)


# -- what it finds ----------------------------------------------------------------------------------------------------


@SEEDS
def test_a_planted_subspace_is_found(seed):
    """By a search that ends by itself, and whose loss falls."""
    made, truth = found(seed), planted(seed)[-1][:2]
    assert 10 < len(made.losses) < 100 and made.losses[-1] < 0.02 < 1 < made.losses[0]
    assert made.held_out.accuracy == made.fitted.accuracy == 1
    cosines = torch.linalg.svdvals(made.basis @ truth.T)
    assert cosines.min() > 0.99


@pytest.mark.parametrize("small", [*slow(1e-2), 1e-6])
def test_what_is_small_is_found_beside_what_is_large(small):
    made, truth = found(small=small), planted(small=small)[-1][:2]
    assert made.held_out.accuracy == 1
    assert torch.linalg.svdvals(made.basis @ truth.T).min() > 0.99
    model, base, donor, _, place, _ = planted(small=small)
    values = [run(model, x, record=[place])[place] for x in (donor, base)]
    edits = made.swap(values[0])
    assert [type(edit) for edit in edits] == [Scale, Project, Add, Scale]
    near(run(model, base, edits).logits, run(model, base, made.swap(*values)).logits, 1e-9)
    assert_close(values[0].sub(values[1])[~made.tested].square().mean(0).sqrt(), made.scale)


def test_without_scales_what_is_large_drowns_what_is_small():
    model, base, donor, targets, place, _ = planted(small=1e-6)
    made = align(model, base, donor, targets, place, 2, seeds=0, epochs=10, progress=False)
    assert made.fitted.interval[1] < 0.6 and (made.scale == 1).all()


@SEEDS
def test_fewer_dimensions_do_not_do_and_the_whole_site_does_too_much(seed):
    made, less = found(seed), found(seed, 1)
    assert less.held_out.interval[1] < 0.8 < made.held_out.interval[0]
    for name in ("nothing", "whole"):  # a quarter of the pairs agree in two bits, half of them in the third
        low, high = made.controls[name][0].interval
        assert low < {"nothing": 0.25, "whole": 0.5}[name] < high and high < made.held_out.interval[0]
    assert made.held_out.log_prob == pytest.approx(-3 * math.log1p(math.exp(-2 * GAIN)), abs=2e-3)


@SEEDS
def test_controls_find_nothing_where_nothing_is(seed):
    controls, agrees = found(seed).controls, 0.25
    assert {name: len(of) for name, of in controls.items()} == {
        "nothing": 1, "whole": 1, "searched": 1, "varying": 1, "random": 1, "shuffled": 1, "forced": 1,
    }  # fmt: skip
    assert controls["random"][0].interval[0] < 0.45  # two random dimensions of the seven that vary
    assert controls["shuffled"][0].interval[0] < 1 / 8 < controls["shuffled"][0].interval[1]
    assert controls["forced"][0].accuracy < agrees  # eight answers from two dimensions, of 210 pairs
    assert controls["varying"][0].accuracy == 1


def test_where_unread_dimensions_hold_copies_the_answers_do_not_say_where_it_is_read():
    model, base, donor, targets, place, truth = planted()
    wide = at.ssm_state(layer=place.layer, pos=place.pos)
    made = align(model, base, donor, targets, wide, 2, seeds=0, progress=False)
    assert made.held_out.accuracy == 1
    e, n = place.features
    assert torch.linalg.svdvals(made.basis[:, list(e), n] @ truth[:2].T).max() < 0.9


def test_the_axes_are_those_of_what_varies():
    """Small coordinates count as much as large ones in what is searched, and rounding does not."""
    d = torch.zeros(40, 3, dtype=torch.float64)
    d[:, :2] = draw(40, 2)
    d[:, 2] = 1e-3 * draw(40, seed=1)
    axes = principal_axes(d, torch.full((3,), 1e-12), None)
    assert axes.shape == (3, 3) and axes[2].norm() == pytest.approx(1)
    near(axes.T @ axes, torch.eye(3, dtype=torch.float64))
    axes = principal_axes(d, torch.full((3,), 0.01), None)  # the third is rounding
    assert axes.shape == (3, 2) and (axes[2] == 0).all()
    assert principal_axes(d, torch.zeros(3), 2).shape == (3, 2)


def test_the_signs_of_axes_are_not_those_that_rounding_gives():
    vectors = draw(9, 4)
    found = span_of(vectors)
    for same in (-vectors, vectors.flip(1), vectors @ torch.linalg.qr(draw(4, 4, seed=1))[0]):
        near(span_of(same), found)


@pytest.mark.parametrize("scale", [False, True])
def test_what_is_rounding_beside_its_own_size_does_not_vary(scale):
    """In float32: 1e4 and the last digits of it is left out, 1e8 and the first of them is not."""
    model, place = tiny(dtype=torch.float32), at.embed(pos=2)
    with torch.no_grad():
        weight = model.backbone.embedding.weight
        weight[:, 0] = 1e4 + 1e-3 * torch.randn(len(weight), generator=torch.Generator().manual_seed(0))
        weight[:, 1] = 1e8 + 1e3 * torch.randn(len(weight), generator=torch.Generator().manual_seed(1))
    made, (base, donor, _) = short(place, k=11, model=model, scale=scale)
    apart = torch.stack([run(model, x, record=[place])[place].detach() for x in (base, donor)]).diff(dim=0)[0]
    assert apart[:, 0].abs().max() > 0
    assert made.dims == 11 and made.basis[:, 0].abs().max() < 1e-12 and made.basis[:, 1].norm() == pytest.approx(1)
    assert made.scale[0] == 1 and (not scale or made.scale[1] > 100)


@pytest.mark.parametrize("turned", [False, True])
def test_what_varies_most_holds_99_percent(turned):
    """A coordinate that hardly varies counts as little as a direction that does."""
    d = draw(40, 4) * torch.tensor([2.0, 0.5, 0.05, 1e-3])
    d = d @ torch.linalg.qr(draw(4, 4, seed=3))[0] if turned else d
    most = most_varying(d)
    assert most.shape == (4, 2)
    near(most.T @ most, torch.eye(2, dtype=torch.float64))
    variance, axes = torch.linalg.eigh(d.T @ d)
    assert variance[2:].sum() > 0.99 * variance.sum() > variance[3]
    near(torch.linalg.svdvals(most.T @ axes[:, 2:]), torch.ones(2, dtype=torch.float64))


# -- dormant directions (Makelov et al. 2023) -------------------------------------------------------------------------

MARGIN = 0.5  # of the answer: half of what the bit adds


def dormant(size, turned=False, weight=10.0, seed=0):
    """A bit that reaches the answer by a channel outside the place; in the place a copy that nothing reads.

    Beside the copy lies a direction that the answer does read, with this weight, and that runs by themselves move by
    `size`, which depends on another token: too little for the answer. Moved by half of what the copy varies by, as a
    swap along the sum of the two moves it, it makes the answer.

    Args:
        turned: the two directions are no coordinates.
    Returns:
        model, ids, donor_ids, targets (of the donor's bit), place, the copy's direction (2,), the dormant one (2,)
    """
    bench, rate, l, b = Bench(seed), 0.05, 6, 200
    layer, bits, others = bench.layer, bench.tokens[:2], bench.tokens[2:4]
    angle = torch.tensor(0.6 if turned else 0.0, dtype=torch.float64)
    copy, quiet = torch.stack([angle.cos(), angle.sin()]), torch.stack([-angle.sin(), angle.cos()])
    writes = {bits[1]: copy, others[1]: size * quiet}
    e = [
        bench.channel(layer, {t: 1.0 + (float(writes[t][c]) if t in writes else 0.0) for t in bench.tokens}, rate=rate)
        for c in range(2)
    ]
    read = bench.channel(layer, {t: 1.0 + (t == bits[1]) for t in bench.tokens}, rate=rate)
    always, n = bench.channel(layer, 1.0), bench.dimension(layer)
    bench.connect(layer, n, B={always: 0.1}, C={always: 10.0})
    model = bench.finish({})
    left = [math.exp(-rate * (l - 1 - t)) for t in range(l)]
    middle = sum(left) * (1 + weight * float(quiet.sum())) + MARGIN * left[0] + weight * size / 2 * left[1]
    with torch.no_grad():
        out = model.backbone.layers[layer].mixer.out_proj.weight
        out[bench.out[0], read], out[bench.out[0], e] = 1.0, weight * quiet
        model.lm_head.weight.zero_()
        for token, sign in zip(bits, (-4.0, 4.0), strict=True):
            model.lm_head.weight[token, bench.out[0]], model.lm_head.weight[token, bench.one] = sign, -sign * middle
    rng = torch.Generator().manual_seed(seed)
    drawn, other = torch.randint(2, (2, 2, b), generator=rng)
    prompts = torch.tensor(bench.tokens[4:10])[torch.randint(6, (2, b, l), generator=rng)]
    prompts[..., 0], prompts[..., 1] = torch.tensor(bits)[drawn], torch.tensor(others)[other]
    answers = torch.tensor(bits)[drawn]
    assert all((run(model, prompts[i]).last_logits.argmax(-1) == answers[i]).all() for i in (0, 1))
    return model, *prompts, answers[1], at.ssm_state(layer=layer, pos=3, e=e, n=n), copy, quiet


def of(one):
    return {name: several[0].accuracy for name, several in one.controls.items()} | {"q": one.held_out.accuracy}


@pytest.mark.parametrize("turned", [False, True])
def test_a_direction_that_no_run_moves_is_not_searched(turned):
    """Along the sum of the two a swap does make the answer, in all pairs; what is searched does not hold it."""
    model, base, donor, targets, place, copy, quiet = dormant(0.0, turned)
    values = [run(model, x, record=[place])[place] for x in (base, donor)]
    both = (copy + quiet) / math.sqrt(2)
    forged = values[0] + ((values[1] - values[0]) @ both)[:, None] * both
    assert accuracy(run(model, base, Set(place, forged)), targets).all()
    made = align(model, base, donor, targets, place, 1, seeds=0, progress=False)
    score = of(made)
    assert made.dims == 1 and abs(float(made.basis[0] @ quiet)) < 1e-9
    assert score["q"] == score["varying"] == score["whole"] == score["nothing"] < 0.7


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("size", [0.01, 0.03])
def test_a_dormant_direction_is_found_and_does_not_pass_the_control(size, turned):
    model, base, donor, targets, place, _, quiet = dormant(size, turned)
    made = align(model, base, donor, targets, place, 1, seeds=0, progress=False)
    score = of(made)
    assert score["q"] == 1 and abs(float(made.basis[0] @ quiet)) > 0.4
    assert score["varying"] == score["whole"] == score["nothing"] < 0.7


def test_in_units_of_its_own_a_dormant_coordinate_is_not_moved_further_than_runs_move_it():
    model, base, donor, targets, place, *_ = dormant(0.01)
    score = of(align(model, base, donor, targets, place, 1, scale=True, seeds=0, progress=False))
    assert score["q"] == score["nothing"] < 0.7


def test_a_direction_that_runs_move_by_a_fifth_passes_the_control_and_the_whole_site_tells():
    """The control cannot see it, as it holds 4 % of the variance; that Q does more than the whole can be seen."""
    model, base, donor, targets, place, *_ = dormant(0.2, weight=2.2)
    score = of(align(model, base, donor, targets, place, 1, seeds=0, progress=False))
    assert score["q"] == score["varying"] == 1
    assert score["whole"] == score["nothing"] < 0.7


# -- what comes back --------------------------------------------------------------------------------------------------

PLACES = [
    at.ssm_state(layer=1, pos=3), at.conv_state(layer=0, pos=3, e=[1, 2, 5]), at.resid_post(layer=1, pos=-3),
    at.recurrent_state(layer=[0, 1], pos=2), at.ssm_state(pos=3, n=2), at.u(layer=2, pos=slice(2, 4)), at.embed(pos=0),
    at.final_norm(pos=-1),
]  # fmt: skip


def short(place, k=2, model=None, **more):
    """A short search in a small model, for answers of no meaning, and what went in: ids, donor_ids, targets."""
    given = ids(6, 40), ids(6, 40, seed=1), ids(40, 1, seed=2)[0]
    options = {"epochs": 2, "seeds": 0, "progress": False, "batch": 16} | more
    return align(model or tiny(), *given, place, k, **options), given


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_the_score_is_that_of_whole_runs_under_its_edits(place, backend):
    model, (made, (base, donor, targets)) = tiny(), short(place, backend=backend)
    values = [run(model, x, record=[place])[place] for x in (base, donor)]
    edits = made.swap(values[1], values[0])
    said = log_prob(run(model, base, edits, backend=backend), targets)
    assert made.held_out.log_prob == pytest.approx(said[made.tested].mean().item(), abs=1e-9)
    assert made.fitted.log_prob == pytest.approx(said[~made.tested].mean().item(), abs=1e-9)
    assert made.tested.sum() == made.held_out.rows == 12
    whole = log_prob(run(model, base, Set(place, values[1])), targets)[made.tested].mean().item()
    assert made.controls["whole"][0].log_prob == pytest.approx(whole, abs=1e-9)
    none = log_prob(run(model, base), targets)[made.tested].mean().item()
    assert made.controls["nothing"][0].log_prob == pytest.approx(none, abs=1e-9)
    flat = made.basis.flatten(1)
    near(flat @ flat.T, torch.eye(2, dtype=torch.float64))
    if not place.layer_axis and isinstance(place.pos, int) and place.site != "recurrent_state":
        pair = made.swap(values[1])
        assert [type(edit) for edit in pair] == [Project, Add]
        near(run(model, base, pair).logits, run(model, base, edits).logits)


def test_all_dimensions_are_the_donors_value():
    place, model = at.ssm_state(layer=1, pos=3, n=[4]), tiny()
    made, (base, donor, _) = short(place, k=24, seeds=1)
    values = [run(model, x, record=[place])[place] for x in (base, donor)]
    assert made.dims == 24 and made.basis.shape == (24, 24, 1)
    near(made.swap(values[1], values[0])[0].to, values[1])
    near(run(model, base, made.swap(values[1])).logits, run(model, base, Set(place, values[1])).logits)
    for control in ("whole", "searched", "random"):
        assert made.held_out.log_prob == pytest.approx(made.controls[control][0].log_prob, abs=1e-9)
    assert made.spread.sum() == pytest.approx(1)
    assert made.controls["forced"][0].rows == made.fitted.rows == 28  # of the pairs that it was found on
    assert made.controls["shuffled"][0].rows == made.held_out.rows == 12
    some, _ = short(place, k=5, dims=5)
    assert some.held_out.log_prob == pytest.approx(some.controls["searched"][0].log_prob, abs=1e-9)
    assert abs(some.held_out.log_prob - made.held_out.log_prob) > 1e-3


def test_its_edits_serve_other_rows_and_generation():
    place, model = at.ssm_state(layer=1, pos=3), tiny()
    made, (base, donor, _) = short(place)
    value = run(model, donor[:2], record=[place])[place]
    edits = made.swap(value, rows=[1, 2])
    out = generate(model, base[:3], 3, edits=edits)
    plain, alone = generate(model, base[:1], 3), generate(model, base[1:3], 3, edits=made.swap(value))
    assert (out.ids[0] == plain.ids[0]).all() and (out.ids[1:] == alone.ids).all()
    near(out.logits[1:], alone.logits)
    scaled, _ = short(place, scale=True)
    here = run(model, base[:2], record=[place])[place]
    for edits, same in (
        (made.swap(value, here, rows=[0, 1]), made.swap(value, here)),
        (scaled.swap(value, rows=[0, 1]), scaled.swap(value)),
    ):
        near(run(model, base[:3], edits).logits[:2], run(model, base[:2], same).logits)
        near(run(model, base[:3], edits).logits[2], run(model, base[2:3]).logits[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [at.ssm_state(layer=1, pos=3), at.conv_state(pos=2), at.u(layer=1, pos=3)], ids=str)
def test_other_types(place, dtype):
    """States are float32 in a model of 16 bits; u and conv_state have its type, in which torch has no QR."""
    made, (base, donor, targets) = short(place, model=tiny(dtype=dtype))
    exact, _ = short(place, model=tiny(dtype=dtype).double())
    assert made.basis.dtype == torch.float64
    bound = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.03}[dtype]
    values = [run(tiny(dtype=dtype), x, record=[place])[place] for x in (donor, base)]
    said = log_prob(run(tiny(dtype=dtype), base, made.swap(*values)), targets)[made.tested].mean().item()
    assert made.held_out.log_prob == pytest.approx(said, abs=bound)
    assert made.controls["whole"][0].log_prob == pytest.approx(exact.controls["whole"][0].log_prob, abs=bound)


# -- what it goes on from ---------------------------------------------------------------------------------------------


def test_padding_and_a_carried_memory_change_nothing():
    model, place = tiny(), at.ssm_state(layer=1, pos=-3)
    whole, (base, donor, targets) = short(place)
    junk = ids(3, 40, seed=5)
    padded = align(model, *(torch.cat([x, junk], 1) for x in (base, donor)), targets, place, 2, epochs=2, seeds=0,
                   batch=16, progress=False, lengths=[6] * 40, groups=range(40))  # fmt: skip
    assert_close(padded.basis, whole.basis)
    assert padded.held_out.log_prob == pytest.approx(whole.held_out.log_prob, abs=1e-9)
    begun = run(model, base[:, :2], keep_state=True).state
    again = torch.cat([base[:, :2], donor[:, 2:]], 1)  # one memory for both: their first tokens are the same
    one = align(model, base, again, targets, place, 2, epochs=2, seeds=0, batch=16, progress=False, groups=range(40))
    two = align(model, base[:, 2:], again[:, 2:], targets, place, 2, epochs=2, seeds=0, batch=16, progress=False,
                groups=range(40), state=begun)  # fmt: skip
    assert_close(two.basis, one.basis)
    assert two.held_out.log_prob == pytest.approx(one.held_out.log_prob, abs=1e-9)


@pytest.mark.parametrize("place", [at.ssm_state(layer=1, pos=-2), at.resid_post(layer=0, pos=1)], ids=str)
def test_rows_of_unequal_length_are_what_they_are_alone(place):
    model, lengths = tiny(), torch.tensor([6, 3, 5] * 10)
    base, donor, targets = ids(6, 30), ids(6, 30, seed=1), ids(30, 1, seed=2)[0]
    made = align(model, base, donor, targets, place, 2, lengths=lengths, epochs=1, seeds=0, progress=False)
    said = []
    for row in made.tested.nonzero()[:, 0]:
        one, other = (x[row : row + 1, : lengths[row]] for x in (base, donor))
        values = [run(model, x, record=[place])[place] for x in (one, other)]
        said.append(log_prob(run(model, one, made.swap(values[1], values[0])), targets[row : row + 1]))
    assert made.held_out.log_prob == pytest.approx(torch.cat(said).mean().item(), abs=1e-9)


def test_memories_that_stand_at_unequal_positions():
    """A place at one position is a row's second token, and another's fourth."""
    model, place, begun = tiny(), at.ssm_state(layer=1, pos=4), torch.tensor([3, 1] * 10)
    base, donor, targets = ids(6, 20), ids(6, 20, seed=1), ids(20, 1, seed=2)[0]
    state = run(model, ids(3, 20, seed=3), keep_state=True, lengths=begun).state
    made = align(model, base, donor, targets, place, 2, state=state, epochs=1, seeds=0, progress=False)
    values = [run(model, x, record=[place], state=state)[place] for x in (donor, base)]
    said = log_prob(run(model, base, made.swap(*values), state=state), targets)[made.tested]
    assert made.held_out.log_prob == pytest.approx(said.mean().item(), abs=1e-9)


def test_a_search_traces_what_its_edit_reaches_and_takes_weights_of_inference_mode():
    pairs = Pairs(tiny(), ids(6), ids(6, seed=1), torch.tensor([1, 2, 3]), at.u(layer=1, pos=3), None, None, 3, "torch")
    assert not any(p.requires_grad for p in pairs.model.parameters())
    with torch.inference_mode():
        inside = tiny()
    place = at.ssm_state(layer=1, pos=3)
    assert torch.equal(short(place, model=inside)[0].basis, short(place)[0].basis)


def test_it_is_the_same_each_time_and_leaves_the_model_alone():
    model, place = tiny(), at.ssm_state(layer=1, pos=3)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    one, _ = short(place, model=model, seeds=1)
    torch.manual_seed(5)
    with torch.no_grad():
        two, _ = short(place, model=model, seeds=1)
    with torch.inference_mode():
        three, _ = short(place, model=model, seeds=1)
    assert torch.equal(one.basis, two.basis) and torch.equal(one.basis, three.basis)
    assert one.controls == two.controls == three.controls
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    base, donor, targets = ids(6, 40), ids(6, 40, seed=1), ids(40, 1, seed=2)[0]
    as_lists = [x.tolist() for x in (base, donor, targets)]
    four, five = (align(model, *given, place, 1, epochs=1, seeds=0, progress=False) for given in (
        (base, donor, targets), as_lists))  # fmt: skip
    assert torch.equal(four.basis, five.basis)
    other, _ = short(place, model=model, seed=1)
    assert not torch.equal(one.tested, other.tested)


def test_backends_change_only_the_last_digits():
    """Rounding does not choose where a search begins, nor the sign of what is found."""
    one, *others = (
        short(at.ssm_state(layer=1, pos=3), seeds=1, batch=16, backend=b)[0] for b in ("reference", "torch", "auto")
    )
    for other in others:
        near(other.basis, one.basis, 1e-6)
        for name, several in one.controls.items():
            assert other.controls[name][0].log_prob == pytest.approx(several[0].log_prob, abs=1e-6)


def test_a_group_is_on_one_side():
    made, (base, donor, targets) = short(at.ssm_state(layer=1, pos=3), groups=torch.arange(40) // 8)
    assert (made.tested.reshape(5, 8).sum(1) % 8 == 0).all() and 0 < made.tested.sum() < 40
    for share in (0.01, 0.99):  # a group at least is scored, and one is fitted
        one, _ = short(at.ssm_state(layer=1, pos=3), groups=torch.arange(40) // 8, held_out=share, epochs=1)
        assert (one.tested if share < 0.5 else ~one.tested).sum() == 8
    twice = [torch.cat([x, x]) for x in (base, donor, targets)]
    again = align(tiny(), *twice, at.ssm_state(layer=1, pos=3), 2, epochs=1, seeds=0, progress=False)
    assert torch.equal(again.tested[:40], again.tested[40:])
    padded = [torch.cat([x, ids(3, 80, seed=s)], 1) for s, x in enumerate(twice[:2])]  # what pads them is no difference
    again = align(tiny(), *padded, twice[2], at.ssm_state(layer=1, pos=3), 2, epochs=1, seeds=0, progress=False,
                  lengths=[6] * 80)  # fmt: skip
    assert torch.equal(again.tested[:40], again.tested[40:])


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("place", [at.ssm_state(layer=1, pos=2), at.resid_post(layer=0, pos=[1, 3])], ids=str)
def test_project_is_differentiable_in_its_directions(place, keep, backend):
    model, tokens, answer = tiny(), ids(5), torch.tensor([1, 2, 3])
    size = run(model, tokens, record=[place])[place].shape[2 if isinstance(place.pos, tuple) else 1 :]

    def said(basis):
        return log_prob(run(model, tokens, Project(place, basis, keep=keep), backend=backend), answer)

    basis = draw(2, *size).requires_grad_()
    assert torch.autograd.gradcheck(said, [basis], atol=1e-7, fast_mode=True)
    (found,) = torch.autograd.grad(said(basis).sum(), basis)
    assert found.norm() > 1e-3
    # the projection is of the span: to mix or scale the directions moves nothing
    flat = found.flatten(1)
    near(flat @ basis.flatten(1).T + 1, torch.ones(2, 2, dtype=torch.float64), 1e-9)


def test_a_swap_is_differentiable_in_the_donor():
    place, model = at.ssm_state(layer=1, pos=2), tiny()
    made, (base, donor, targets) = short(place)
    value = run(model, donor[:3], record=[place])[place].detach().requires_grad_()
    here = run(model, base[:3], record=[place])[place].detach()
    both = [log_prob(run(model, base[:3], made.swap(value, b)), targets[:3]).sum() for b in (None, here)]
    one, two = (torch.autograd.grad(x, value)[0] for x in both)
    near(one, two, 1e-9)
    flat, q = one.flatten(1), made.basis.flatten(1)
    near(flat @ q.T @ q, flat, 1e-9)  # along the subspace alone
    assert flat.norm() > 1e-6


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"place": "ssm_state"}, EditError, "no address"),
        ({"place": at.ssm_state(layer=7, pos=3)}, AddressError, "layer=7"),
        ({"place": at.ssm_state(layer=1, pos=9)}, AddressError, "no position 9"),
        ({"place": at.resid_post(layer=1, pos=2, d=3)}, InputError, "more than one number"),
        ({"place": at.ssm_state(layer=1), "lengths": [6, 4] * 20}, InputError, "not finite"),
        ({"k": 0}, InputError, "from 1 to 28"),
        ({"donor_ids": ids(6, 40)}, InputError, "from 1 to 0"),
        ({"k": 29}, InputError, "the 28 pairs that are fitted"),
        ({"k": 6, "dims": 5}, InputError, "dims=5"),
        ({"dims": 0}, InputError, "dims=0"),
        ({"dims": 2.5}, InputError, "dims=2.5"),
        ({"k": 1.5}, InputError, "k=1.5"),
        ({"targets": torch.zeros(40)}, InputError, "integers"),
        ({"targets": "targets"}, InputError, "integers"),
        ({"targets": torch.zeros(39, dtype=torch.long)}, InputError, "each pair"),
        ({"targets": torch.full((40,), 29)}, InputError, "29 is outside the vocabulary"),
        ({"donor_ids": ids(5, 40)}, InputError, "differ in shape"),
        ({"held_out": 1.0}, InputError, "held_out=1.0"),
        ({"epochs": 0}, InputError, "epochs=0"),
        ({"learning_rate": 0.0}, InputError, "learning_rate=0.0"),
        ({"seeds": -1}, InputError, "seeds=-1"),
        ({"batch": 0}, InputError, "batch=0"),
        ({"groups": [0] * 40}, InputError, "one group"),
        ({"groups": [0] * 3}, InputError, "3 groups for 40 rows"),
        ({"model": "mamba"}, InputError, "a str; give a Mamba"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_cannot_be_asked_is_said(change, error, says):
    base, donor, targets = ids(6, 40), ids(6, 40, seed=1), ids(40, 1, seed=2)[0]
    given = {"model": tiny(), "ids": base, "donor_ids": donor, "targets": targets, "place": PLACES[0], "k": 2}
    with pytest.raises(error, match=says):
        align(**given | {"progress": False} | change)


def test_a_swap_says_what_it_lacks():
    made, _ = short(at.ssm_state(layer=1, pos=3))
    with pytest.raises(
        InputError, match=r"donor is \(3, 2\): give what ssm_state\(layer=1, pos=3\) records, \(24, 5\)"
    ):
        made.swap(torch.zeros(3, 2))
    with pytest.raises(InputError, match="donor is list"):
        made.swap([1.0])
    with pytest.raises(InputError, match="base is"):
        made.swap(torch.zeros(3, 24, 5), torch.zeros(3, 5, 24))
    for place in (at.ssm_state(layer=[0, 1], pos=3), at.u(layer=1, pos=[1, 2]), at.recurrent_state(layer=1, pos=3)):
        made, (_, donor, _) = short(place)
        values = run(tiny(), donor, record=[place])[place]
        with pytest.raises(EditError, match="Give base"):
            made.swap(values)


# -- the plot ---------------------------------------------------------------------------------------------------------


def test_the_curve_shows_what_was_found():
    def scored(place, k):
        made, low = short(place, k, seeds=1)[0], Swapped(k / 10, (k / 10 - 0.05, k / 10 + 0.05), -1.0, 12)
        best = Swapped(k / 5, (k / 5 - 0.1, k / 5 + 0.1), -1.0, 12)
        return replace(made, held_out=best, controls={**made.controls, "whole": (low,)})

    several = [scored(PLACES[0], k) for k in (3, 1, 2)] + [scored(PLACES[1], 1)]
    with pytest.raises(InputError, match="one place"):
        alignment_curve(several)
    with pytest.raises(InputError, match="at least one Alignment"):
        alignment_curve([])
    several = several[:3]
    ax = alignment_curve(several, title="planted")
    drawn = {line.get_label(): line for line in ax.lines}
    best = drawn["found by alignment"]
    by_k = sorted((len(one.basis), one.held_out.accuracy) for one in several)
    assert [*zip(best.get_xdata(), best.get_ydata(), strict=True)] == by_k
    whole = sum(one.controls["whole"][0].accuracy for one in several) / 3
    assert drawn["whole site swapped"].get_ydata()[0] == pytest.approx(whole)
    assert {"nothing swapped", "random subspaces", "found for shuffled targets"} < set(drawn)
    assert [*ax.get_xticks()] == [1, 2, 3] and ax.get_title() == "planted"
    for legend in (True, False):  # of itself it fits on its page
        ax = alignment_curve(several, legend=legend)
        ax.figure.canvas.draw()
        page = ax.figure.bbox
        for part in (ax.yaxis.label, ax.xaxis.label, *([ax.get_legend()] if legend else [])):
            box = part.get_window_extent()
            assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
    plt.close("all")

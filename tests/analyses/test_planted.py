"""The planted models do what is said of them, and what is said of them is true: by closed forms and by brute force."""

import pytest
import torch

from analyses.planted import MODELS, Flow, plant
from analyses.planted.truth import NEGLIGIBLE, NOTABLE, SITES
from interp import Set, Zero, at, run
from minimal_mamba.errors import InputError

EVERY = [(name, seed) for name in MODELS for seed in (0, 1)]  # `latch` and `recall` have two variants
MORE = [(name, seed) for name in MODELS for seed in range(6)]
CACHE: dict = {}


def planted(name, seed):
    if (name, seed) not in CACHE:
        CACHE[name, seed] = plant(name, seed)
    return CACHE[name, seed]


def close(found, expected, tol=1e-9):
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


@pytest.mark.parametrize(("name", "seed"), MORE)
def test_the_answer_is_the_closed_form(name, seed):
    p = planted(name, seed)
    with torch.no_grad():
        for ids in (p.ids, p.donor_ids, p.sample(64, seed)):
            close(p.metric(run(p.model, ids, backend="reference").logits), p.answer(ids))
    assert (p.gap.abs() > 0.5).all()
    assert (p.ids != p.donor_ids).any(0).sum() > 1  # they differ where it matters, and elsewhere
    assert torch.equal(p.ids[:, -1], p.donor_ids[:, -1])


@pytest.mark.parametrize(("name", "seed"), EVERY)
def test_the_state_is_what_it_is_said_to_be(name, seed):
    p = planted(name, seed)
    states = at.ssm_state()
    with torch.no_grad():
        h = run(p.model, p.ids, record=[states])[states]  # (layers, b, l, e, n)
    for (layer, e, n), expected in p.truth.state.items():
        close(h[layer, :, :, e, n], expected)


@pytest.mark.parametrize(("name", "seed"), EVERY)
def test_every_cell_of_the_truth_is_that_of_one_run(name, seed):
    """Brute force: the donor's value put into the base run, each cell in rows of its own."""
    p = planted(name, seed)
    layers, (b, l) = p.model.config.n_layer, p.ids.shape
    cells = [(layer, pos) for layer in range(layers) for pos in range(l)]
    with torch.no_grad():
        for site in SITES:
            where = getattr(at, site)
            donor = run(p.model, p.donor_ids, record=[where()])[where()]  # (layers, b, l, ...)
            edits = [
                Set(where(layer=layer, pos=pos), donor[layer, :, pos], rows=range(b * i, b * (i + 1)))
                for i, (layer, pos) in enumerate(cells)
            ]
            moved = p.metric(run(p.model, p.ids.repeat(len(cells), 1), edits).logits).unflatten(0, (len(cells), b))
            close(moved - p.answer(p.ids), p.truth.effects[site].flatten(0, 1), 1e-8)


@pytest.mark.parametrize(("name", "seed"), EVERY)
def test_an_edge_moves_what_it_is_said_to_move(name, seed):
    """By hand: the donor's dt, B, C or decay at one position."""
    p = planted(name, seed)
    layers, (b, l) = p.model.config.n_layer, p.ids.shape
    cells = [(layer, pos) for layer in range(layers) for pos in range(l)]
    with torch.no_grad():
        for sender, site in (("u", "dt"), ("u", "B"), ("u", "C"), ("dt", "decay")):
            where = getattr(at, site)
            donor = run(p.model, p.donor_ids, record=[where()])[where()]
            edits = [
                Set(where(layer=layer, pos=pos), donor[layer, :, pos], rows=range(b * i, b * (i + 1)))
                for i, (layer, pos) in enumerate(cells)
            ]
            moved = p.metric(run(p.model, p.ids.repeat(len(cells), 1), edits).logits).unflatten(0, (len(cells), b))
            for i, (layer, pos) in enumerate(cells):
                told = p.truth.edges.get(((sender, layer, pos), (site, layer, pos)), torch.zeros(b).double())
                close(moved[i] - p.answer(p.ids), told, 1e-8)


@pytest.mark.parametrize(("name", "seed"), [(name, 1) for name in MODELS])
def test_a_coordinate_moves_what_it_is_said_to_move_and_all_others_nothing(name, seed):
    p = planted(name, seed)
    layers, (b, l), e_n = p.model.config.n_layer, p.ids.shape, (p.model.config.d_inner, p.model.config.d_state)
    pos = l // 2
    with torch.no_grad():
        states = at.ssm_state(pos=pos)
        donor = run(p.model, p.donor_ids, record=[states])[states]  # (layers, b, e, n)
        for layer in range(layers):
            cells = [(e, n) for e in range(e_n[0]) for n in range(e_n[1])]
            own = run(p.model, p.ids, record=[states])[states][layer]
            each = own.repeat(len(cells), 1, 1)
            for i, (e, n) in enumerate(cells):
                each[b * i : b * (i + 1), e, n] = donor[layer, :, e, n]
            out = run(p.model, p.ids.repeat(len(cells), 1), [Set(at.ssm_state(layer=layer, pos=pos), each)])
            moved = (p.metric(out.logits).unflatten(0, (len(cells), b)) - p.answer(p.ids)).reshape(*e_n, b)
            expected = torch.zeros_like(moved)
            for (of, e, n), by_pos in p.truth.coordinates.items():
                if of == layer:
                    expected[e, n] = by_pos[pos]
            close(moved, expected, 1e-8)


@pytest.mark.parametrize(("name", "seed"), EVERY)
def test_knocking_out_what_a_token_wrote_takes_its_contribution(name, seed):
    p = planted(name, seed)
    with torch.no_grad():
        for s in range(p.ids.shape[1]):
            gone = p.metric(run(p.model, p.ids, [Zero(at.state_write(layer=p.truth.layer, pos=s))]).logits)
            close(p.answer(p.ids) - gone, p.truth.contributions[:, s], 1e-8)
            assert (Flow(p.truth.layer, s, p.ids.shape[1] - 1, "scan") in p.truth.flows) == (
                p.truth.contributions[:, s].abs().max() > 1e-6
            )


@pytest.mark.parametrize(("name", "seed"), EVERY)
def test_a_position_without_time_or_memory_moves_what_it_is_said_to_move(name, seed):
    p = planted(name, seed)
    (b, l), layer = p.ids.shape, p.truth.layer
    with torch.no_grad():
        for site, value, told in ((at.dt, 0.0, p.truth.frozen), (at.decay, 0.0, p.truth.forgotten)):
            edits = [Set(site(layer=layer, pos=t), value, rows=range(b * t, b * (t + 1))) for t in range(l)]
            moved = p.metric(run(p.model, p.ids.repeat(l, 1), edits).logits).unflatten(0, (l, b)) - p.answer(p.ids)
            close(moved, told, 1e-8)


@pytest.mark.parametrize(("name", "seed"), MORE)
def test_no_effect_is_so_small_that_one_could_argue(name, seed):
    p = planted(name, seed)
    t = p.truth
    numbers = [*t.effects.values(), *t.edges.values(), t.contributions, t.frozen, t.forgotten, *t.held.values()]
    size = torch.cat([v.reshape(-1, len(p.ids)).abs().amax(1) for v in numbers if v is not t.contributions])
    size = torch.cat([size, t.contributions.abs().amax(0)]) / p.gap.abs().max()
    assert ((size < NEGLIGIBLE) | (size > NOTABLE)).all()


@pytest.mark.parametrize(("name", "seed"), MORE)
def test_size_says_nothing(name, seed):
    """Neither the largest number of the state nor the largest difference to the donor is of the circuit."""
    p = planted(name, seed)
    with torch.no_grad():
        base, donor = (run(p.model, ids, record=[at.ssm_state()])[at.ssm_state()] for ids in (p.ids, p.donor_ids))
    for size in (base.abs(), (donor - base).abs()):
        largest = size.amax((1, 2))  # (layers, e, n)
        assert largest[p.truth.layer].max() > 3 * max([0.0, *(largest[c] for c in p.truth.coordinates)])
        assert (largest.amax(2) > 0.1).float().mean() > 0.5  # distractors are alive, and tell the two prompts apart
        assert largest.max() < 1e3


def test_the_seed_draws_all_that_a_method_could_guess():
    truths = [planted("accumulator", seed).truth for seed in range(8)]
    assert {t.layer for t in truths} == {0, 1, 2}
    assert len({next(iter(t.coordinates)) for t in truths}) > 6
    with pytest.raises(InputError, match="accumulator"):
        plant("acumulator")


@pytest.mark.parametrize(("name", "seed"), EVERY)
def test_a_token_matters_by_the_routes_that_the_flows_name(name, seed):
    """By hand: in each layer, what tokens other than the source, or the scan's B, C and dt, would be without it."""
    p = planted(name, seed)
    b, l = p.ids.shape
    found, ids = set(), p.ids.repeat(l - 1, 1)
    with torch.no_grad():
        for layer in range(p.model.config.n_layer):

            def each(make, layer=layer):  # one source a block of rows
                return [edit for s in range(l - 1) for edit in make(layer, s, range(b * s, b * (s + 1)))]

            u, scan = at.u(layer=layer), [getattr(at, site)(layer=layer) for site in ("dt", "B", "C")]
            gone = each(lambda layer, s, rows: [Zero(at.mixer_in(layer=layer, pos=s), rows=rows)])
            without, base = run(p.model, ids, gone, record=[u, *scan]), run(p.model, ids, record=[u, *scan])
            others = without[u]
            for s in range(l - 1):
                others[b * s : b * (s + 1), s] = base[u][b * s : b * (s + 1), s]
            routes = {
                "scan": each(lambda layer, s, rows: [Zero(at.state_write(layer=layer, pos=s), rows=rows)]),
                "selection": [Set(a, without[a]) for a in scan],
                "conv": [Set(u, others), *(Set(a, base[a]) for a in scan)],
            }
            for route, edits in routes.items():
                moved = p.metric(run(p.model, ids, edits).logits).unflatten(0, (l - 1, b)) - p.answer(p.ids)
                found |= {(layer, s, route) for s in range(l - 1) if moved[s].abs().max() > 1e-6}
    assert found == {(f.layer, f.source, f.kind) for f in p.truth.flows}

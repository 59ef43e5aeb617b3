"""A NaN of the model is no padding: no method turns it into a number."""

import math

import pytest
import torch

from interp import (
    Apply,
    Circuit,
    Edge,
    EdgeEffects,
    Grid,
    Knockout,
    accuracy,
    agreement,
    at,
    attention,
    contrast,
    edge_attribution,
    edges,
    effective_rank,
    faithfulness,
    gradient_field,
    knockout,
    knockout_leak,
    logit_diff,
    mean_of,
    path_patch,
    prune,
    receptive_field,
    run,
    state_flow,
    state_rank,
)
from minimal_mamba.errors import InputError
from tests.helpers import tiny

BAD = 7  # a token whose embedding is NaN
LENGTHS = [6, 2, 1]


def broken():
    model = tiny(tie_embeddings=False)
    with torch.no_grad():
        model.backbone.embedding.weight[BAD] = torch.nan
    ids = torch.randint(0, 29, (3, 6), generator=torch.Generator().manual_seed(0))
    ids[ids == BAD] = BAD + 1
    good, bad = ids.clone(), ids.clone()
    bad[0, 2] = BAD
    return model, good, bad


def metric(logits):
    return logit_diff(logits, 3, 5)


def test_what_is_taken_apart_is_nan_where_the_model_is_and_exact_in_the_other_rows():
    model, good, bad = broken()
    field, right = (receptive_field(model, ids, 1, lengths=LENGTHS) for ids in (bad, good))
    assert field.share[0].isnan().all() and field.width()[0].isnan()
    torch.testing.assert_close(field.share[1:], right.share[1:])
    flow, clean = (state_flow(model, ids, 0, lengths=LENGTHS) for ids in (bad, good))
    assert flow.state[0, 2:].isnan().all() and flow.from_keep[0, 2:].isnan().all()
    torch.testing.assert_close(flow.state[0, :2], clean.state[0, :2])
    torch.testing.assert_close(flow.state[1:], clean.state[1:])
    weights = attention(model, bad, layer=0, targets=[-1], lengths=LENGTHS).weights
    assert weights[0, 0, :3].isnan().all() and weights[1:].isfinite().all()


def test_means_and_ranks_see_a_nan():
    model, good, bad = broken()
    place = at.y(layer=1)
    assert mean_of(model, [(bad, torch.tensor(LENGTHS))], place, progress=False).isnan().all()
    right = mean_of(model, [(good, torch.tensor(LENGTHS))], place, progress=False)
    seen = run(model, good, record=place, lengths=LENGTHS)[place]
    real = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
    torch.testing.assert_close(right.flatten(), seen[real].mean(0))
    with pytest.raises(InputError, match="NaN"):
        state_rank(model, bad, 1, lengths=LENGTHS)
    with pytest.raises(InputError, match="NaN"):
        effective_rank(torch.tensor([[1.0, 2.0], [math.inf, 0.0]]))
    assert effective_rank(torch.ones(3, 2)).participation == 0
    with pytest.raises(InputError, match="NaN at a source"):
        knockout(model, bad, Knockout(0, 0, 1), baseline="mean", lengths=LENGTHS)
    last = at.y(layer=1, pos=-1)
    recorded = [run(model, ids, record=last)[last] for ids in (bad, good)]
    with pytest.raises(InputError, match="NaN"):
        contrast(last, *recorded)


def test_a_nan_is_no_sign_that_nothing_leaks_and_no_wrong_answer():
    model, _, bad = broken()
    assert math.isnan(knockout_leak(model, bad[:1], Knockout(0, -1, slice(None), "all"))[0])
    assert accuracy(run(model, bad), 3).isnan().tolist() == [True, False, False]


def test_a_donors_nan_goes_through_the_edge():
    model, good, bad = broken()
    edge = Edge(at.x(layer=0, pos=2), at.u(layer=0, pos=2))
    effects = path_patch(model, good, bad, [edge], metric, progress=False)
    assert effects.values.isnan().tolist() == [[True, False, False]]
    none = faithfulness(model, Circuit((), (), ()), good, bad, metric, ablate="mean", progress=False)
    assert none.corrupt.isnan().all()
    with pytest.raises(InputError, match="NaN"):
        prune(effects, keep=1)
    spoiled = EdgeEffects(effects.edges, torch.full((1, 3), torch.inf), *(torch.zeros(3),) * 2, model.config, 6)
    with pytest.raises(InputError, match="infinite"):
        prune(spoiled, keep=1)


def test_grids_with_nan_do_not_agree():
    zero = torch.zeros(3)
    whole = torch.arange(12.0).reshape(2, 2, 3)
    grids = [Grid(v, zero, zero + 1, "y", (0, 1), (0, 1)) for v in (whole, whole.where(whole != 5, torch.nan))]
    for pair in (grids, grids[::-1]):
        with pytest.raises(InputError, match="NaN"):
            agreement(*pair)


def test_a_field_is_of_all_positions_in_their_order():
    model, good, _ = broken()
    for site in (at.embed(pos=[5, 4, 3, 2, 1, 0]), at.embed(pos=slice(-6, None)), at.resid_pre(layer=[1])):
        with pytest.raises(InputError, match="all positions"):
            gradient_field(model, good, metric, site=site, lengths=LENGTHS)


@pytest.mark.parametrize("layer", [[1, 2], slice(None), True])
def test_a_method_of_one_layer_takes_one_layer(layer):
    model, good, _ = broken()
    for method in (receptive_field, state_flow, state_rank):
        with pytest.raises((InputError, IndexError), match="layer"):
            method(model, good, layer)


def test_apply_that_overflows_is_seen():
    model, good, _ = broken()
    edits = [Apply(at.u(layer=1, pos=2), lambda u: u / 0)]
    assert not state_flow(model, good, 1, edits=edits).state[:, 2:].isfinite().all(-1).any()


def test_path_attribution_works_under_inference_mode():
    model, ids, _ = broken()
    want = edge_attribution(model, ids, ids.flip(1), metric, edges(model.config, 6, positions=5))
    with torch.inference_mode():
        found = edge_attribution(model, ids.clone(), ids.flip(1), metric, edges(model.config, 6, positions=5))
    torch.testing.assert_close(found.values, want.values)

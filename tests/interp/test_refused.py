"""What would give plausible numbers for another question is refused, and the text says what to do."""

import inspect
import typing
import warnings
from dataclasses import replace

import pytest
import torch

from interp import (
    Apply,
    Circuit,
    Direction,
    HookedMamba,
    Knockout,
    Scale,
    Zero,
    agreement,
    align,
    at,
    attention,
    attribution_grid,
    collect,
    contrast,
    decay_bands,
    direct_logit,
    edge_attribution,
    edges,
    effective_rank,
    faithfulness,
    generate,
    gradient_field,
    gradients,
    half_life_curves,
    half_lives,
    kl,
    knockout,
    knockout_grid,
    knockout_leak,
    load_edits,
    log_prob,
    logit_diff,
    logit_lens,
    patch_grid,
    path_patch,
    plots,
    probe,
    probe_grid,
    prune,
    receptive_field,
    run,
    save_edits,
    state_lens,
    state_rank,
    steering_curve,
    sweep,
    tuned_lens,
    typical_dt,
)
from interp.run import MetricError
from minimal_mamba.errors import BackendUnavailable, EditError, InputError
from tests.helpers import tiny

MODEL = tiny()
IDS = torch.randint(0, 29, (3, 6), generator=torch.Generator().manual_seed(0))
DONOR = IDS.flip(1).clone()
QUIET = {"progress": False}
EDGE = edges(MODEL.config, 6)[0]
CIRCUIT = Circuit((EDGE,), (1.0,), (1.0,))
RESID, RUN = at.resid_post(layer=0, pos=-1), run(MODEL, IDS)


def nested(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that the one of the two layouts is a prototype
        return torch.nested.nested_tensor([IDS[0], IDS[1, :3]], layout=layout)


def metric(logits):
    return logit_diff(logits, 3, 5)


def test_an_estimate_is_not_held_against_another_site_or_the_other_direction():
    exact = patch_grid(MODEL, IDS, DONOR, site="y", metric=metric, **QUIET)
    other = attribution_grid(MODEL, IDS, DONOR, site="skip", metric=metric, **QUIET)
    with pytest.raises(InputError, match="the grids differ"):
        agreement(other, exact)
    swapped = attribution_grid(MODEL, DONOR, IDS, site="y", metric=metric, **QUIET)
    with pytest.raises(InputError, match="exchanged"):
        agreement(swapped, exact)


def test_several_positions_or_layers_where_one_is_meant():
    with pytest.raises(InputError, match="one position"):
        knockout_grid(MODEL, IDS, metric, target=[3, 4], **QUIET)
    for method in (lambda p: direct_logit(MODEL, IDS, 3, pos=p), lambda p: receptive_field(MODEL, IDS, 0, pos=p)):
        for pos in ([0, 1], slice(2)):
            with pytest.raises(InputError, match="one position"):
                method(pos)


def test_windows_of_layers_are_named_as_in_patch_grid():
    one = knockout_grid(MODEL, IDS, metric, layers=2, **QUIET)
    both = knockout_grid(MODEL, IDS, metric, layers=[(0, 1), 2], **QUIET)
    some = knockout_grid(MODEL, IDS, metric, layers=slice(1, None), **QUIET)
    assert (one.layers, both.layers, some.layers) == (((2,),), ((0, 1), (2,)), ((1,), (2,)))
    torch.testing.assert_close(one.values[0], both.values[1])
    for wrong in ({"window": 2, "layers": [0]}, {"batch": 0}, {"window": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            knockout_grid(MODEL, IDS, metric, **wrong, **QUIET)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda: sweep(MODEL, IDS, [at.y(layer=0)], metric, **QUIET), "cells="),
        (lambda: sweep(MODEL, IDS, Zero(at.y(layer=0)), metric, **QUIET), "cells="),
        (lambda: path_patch(MODEL, IDS, DONOR, edges=[at.y(layer=0)], metric=metric, **QUIET), "no edge"),
        (lambda: collect(MODEL, IDS, at.y(layer=0), batch=0), "batch=0"),
        (lambda: collect(MODEL, IDS, at.y(layer=0), batch="8"), "batch='8': at least 1 row at a time, an int"),
        (lambda: knockout_grid(MODEL, IDS, metric, batch=2.0, **QUIET), r"batch=2\.0: at least 1"),
        (lambda: sweep(MODEL, IDS, [], metric, memory="1GB", **QUIET), "memory='1GB': a number of bytes, such as 1073"),
        (lambda: sweep(MODEL, IDS, [], metric, memory=float("nan"), **QUIET), "memory=nan: a number of bytes"),
        (lambda: patch_grid(MODEL, IDS, DONOR, site="y", metric=metric, memory=None, **QUIET), "memory=None: a number"),
        (lambda: run(MODEL, IDS.to("meta")), "ids is meta, which holds no numbers; give a dense tensor"),
        (lambda: run(MODEL, IDS, lengths=torch.ones(3, device="meta").long()), "lengths.* is meta, .* give one int of"),
        (lambda: run(MODEL, IDS.to_sparse()), "ids is sparse; give a dense tensor"),
        *(
            (lambda layout=layout: run(MODEL, nested(layout)), "ids is nested; .* right-padded where rows differ")
            for layout in (torch.jagged, torch.strided)
        ),
        (lambda: probe(torch.randn(20), torch.arange(20) % 2), "features"),
        (lambda: probe(torch.randn(20, 3), torch.arange(20) % 2, other=torch.full((20, 3), torch.nan)), "other"),
        (lambda: probe(torch.randn(20, 3), [0, "a"] * 10), "mix"),
        (lambda: probe_grid(MODEL, IDS, ["a", "b", "a"], site="y", positions=[-1], **QUIET), "index strings"),
        (lambda: probe_grid(MODEL, IDS, torch.zeros(7), site="y", positions=[-1], **QUIET), "labels"),
        (lambda: effective_rank(torch.randn(4)), "samples"),
        (lambda: effective_rank(torch.randn(4, 3), threshold=2.0), "threshold"),
        (lambda: effective_rank(torch.randn(1, 3)), "one sample is its own mean"),
        (lambda: state_rank(MODEL, IDS[:1], 1, pos=-1), "one sample is its own mean"),
        (lambda: logit_diff(torch.randn(3, 5), " cat", " mat"), "tokens=' cat' are no token ids; encode text first"),
        (lambda: contrast(RESID, RUN, RUN), r"positive is a Run: give what was recorded, such as run_\[resid_post\("),
        (
            lambda: patch_grid(MODEL, IDS, DONOR, site=at.ssm_state(), metric=metric, **QUIET),
            "give the name, 'ssm_state'",
        ),
        (lambda: attribution_grid(MODEL, IDS, DONOR, site=at.y(), metric=metric, **QUIET), "give the name, 'y'"),
        (lambda: probe_grid(MODEL, IDS, [0, 1, 0], site=at.y(), **QUIET), "give the name, 'y'"),
        (lambda: probe_grid(MODEL, IDS, [0, 1, 0], site=3, **QUIET), "site=3 is no site"),
        (lambda: direct_logit(MODEL, IDS, "a"), "token ids"),
        (lambda: log_prob(torch.randn(3, 5), torch.tensor([True, False, True])), "torch.bool"),
        (lambda: HookedMamba(MODEL)(IDS[:, :1], return_type="loss"), "no next token"),
        (lambda: generate(MODEL, IDS, 2, Apply(at.x(layer=0), lambda x: x / 0 * 0)), "hold NaN"),
        (lambda: generate(MODEL, IDS, 2, Apply(at.x(layer=0), lambda x: x / 0 * 0), temperature=1.0), "hold NaN"),
    ],
)
def test_bad_input_is_named(wrong, text):
    with pytest.raises((InputError, EditError), match=text):
        wrong()


def test_kl_of_logits_with_tokens_ruled_out():
    p, q = torch.randn(2, 3, 7, dtype=torch.float64).log_softmax(-1)
    p[:, 2] = -torch.inf
    want = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1)))[:, [0, 1, 3, 4, 5, 6]].sum(-1)
    torch.testing.assert_close(kl(p, q), want)
    assert kl(q, p).tolist() == [torch.inf] * 3  # q gives weight to what p rules out


def test_what_is_no_edit_metric_backend_strength_or_position(tmp_path):
    one = Scale(at.u(layer=0), 2.0)
    save_edits(one, tmp_path / "one")
    assert load_edits(tmp_path / "one") == [one]
    push = Direction(RESID, torch.ones(12) / 12**0.5, 1.0)
    for given in ([at.u(layer=0)], [one, "x"], push):
        with pytest.raises(EditError, match="among the edits"):
            save_edits(given, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(MetricError, match="no function of logits"):
        sweep(MODEL, IDS, [one], [metric], **QUIET)
    for early in (lambda x: x[:, 2, 3], lambda x: x[:, :-1].gather(2, IDS[:, 1:, None])[..., 0].sum(1)):
        sweep(MODEL, IDS, [one], early, **QUIET)
        for call in (lambda m: sweep(MODEL, IDS, [one], m, lengths=[6, 3, 5], **QUIET),
                     lambda m: gradients(MODEL, IDS, m, at.embed(), lengths=[6, 3, 5])):  # fmt: skip
            with pytest.raises(MetricError, match="each row's last token alone"):
                call(early)
    with pytest.raises(IndexError, match=r"^index 7 is out"):  # what is no matter of padding stays as it is
        sweep(MODEL, IDS, [one], lambda x: x[:, 7, 3], **QUIET)
    with pytest.raises(BackendUnavailable, match="no backend None"):
        run(MODEL, IDS, backend=None)
    curve = steering_curve(MODEL, IDS, push, metric, (s for s in (0.0, 1.0)), controls=0, **QUIET)
    assert curve.strengths.tolist() == [0, 1] and curve.values.shape == (2, 3)
    with pytest.raises(InputError, match="finite"):
        steering_curve(MODEL, IDS, Direction(at.resid_post(layer=0), torch.ones(12), 1.0), metric, [1.0, float("inf")])
    for way in ({}, {"steps": 2}):
        with pytest.raises((EditError, InputError), match="'x'"):
            attribution_grid(MODEL, IDS, DONOR, site="u", metric=metric, edits=["x"], **way, **QUIET)
    state = run(MODEL, IDS, keep_state=True).state
    with pytest.raises(InputError, match="0 or more"):
        run(MODEL, IDS, state=replace(state, position=state.position - 9))


def test_what_is_no_model_state_logits_grid_or_parts():
    hooked = HookedMamba(MODEL)
    for wrong in ("state-spaces/mamba-130m", hooked, IDS):
        for method in (run, lambda m, ids: generate(m, ids, 2), lambda m, ids: sweep(m, ids, [], metric, **QUIET),
                       lambda m, ids: patch_grid(m, ids, DONOR, site="y", metric=metric, **QUIET)):  # fmt: skip
            with pytest.raises(InputError, match=f"model is a {type(wrong).__name__}"):
                method(wrong, IDS)
    with pytest.raises(InputError, match=r"keep_state=True"):
        run(MODEL, IDS, state=RUN)
    for wrong in (MODEL(IDS), RUN.logits.detach().numpy()):
        with pytest.raises(InputError, match=f"logits is a {type(wrong).__name__}"):
            logit_diff(wrong, 1, 2)
    with pytest.raises(EditError, match="by name"):
        patch_grid(MODEL, IDS, DONOR, site="y", metric=metric, parts=["a"], **QUIET)
    with pytest.raises(InputError, match="pass the input_ids"):
        run(MODEL, {"input_ids": IDS})


@pytest.mark.parametrize("draw", [getattr(plots, name) for name in plots.__all__], ids=plots.__all__)
def test_a_plot_says_what_it_was_given_and_what_it_draws(draw):
    arguments = inspect.signature(draw).parameters.values()
    named = [a.name for a in arguments if a.default is a.empty and a.kind is a.POSITIONAL_OR_KEYWORD]
    label = {"label": "x"} if "label" in inspect.signature(draw).parameters else {}
    hints = typing.get_type_hints(draw, {"Axes": object})
    meant = next(iter(typing.get_args(hints[named[0]]) or [hints[named[0]]])).__name__
    for wrong in (RUN, None, RUN.logits.detach().numpy(), {"a": RUN}, [RUN], [], 3, "grid"):
        text = rf"^{named[0]}(\[0\])? is (a {type(wrong).__name__}|a Run|empty); give .*{meant}"
        with pytest.raises(InputError, match=text):
            draw(*[wrong] * len(named), **label)


def test_a_plot_of_half_lives_takes_each_layers():
    with pytest.raises(InputError, match=r"lives has shape \(24, 5\); it is \(layers, e, n\)"):
        half_life_curves(half_lives(MODEL)[0])


WRONG_IDS = (IDS + 29, IDS.float(), IDS[0], "text")
NAMED = {
    "patch_grid": lambda ids, donor: patch_grid(MODEL, ids, donor, site="y", metric=metric, **QUIET),
    "attribution_grid": lambda ids, donor: attribution_grid(MODEL, ids, donor, site="y", metric=metric, **QUIET),
    "path_patch": lambda ids, donor: path_patch(MODEL, ids, donor, [EDGE], metric=metric, **QUIET),
    "edge_attribution": lambda ids, donor: edge_attribution(MODEL, ids, donor, metric=metric),
    "faithfulness": lambda ids, donor: faithfulness(MODEL, CIRCUIT, ids, donor, metric=metric, **QUIET),
    "align": lambda ids, donor: align(MODEL, ids, donor, [1, 2, 3], RESID, 1, **QUIET),
}


@pytest.mark.parametrize("wrong", WRONG_IDS, ids=["token", "float", "shape", "text"])
@pytest.mark.parametrize("method", NAMED)
def test_errors_name_which_ids_were_wrong(method, wrong):
    with pytest.raises(InputError, match=r"^ids( |:)"):
        NAMED[method](wrong, DONOR)
    with pytest.raises(InputError, match=r"^donor_ids( |:)"):
        NAMED[method](IDS, wrong)
    with pytest.raises(InputError, match=r"^ids \(3, 6\) and donor_ids \(3, 5\) differ in shape"):
        NAMED[method](IDS, DONOR[:, :5])


def test_errors_name_which_state_or_targets_were_wrong():
    state = run(MODEL, IDS, keep_state=True).state
    for wrong in (3, run(MODEL, IDS[:2], keep_state=True).state):
        for given, name in (({"state": wrong}, "state"), ({"state": state, "donor_state": wrong}, "donor_state")):
            with pytest.raises(InputError, match=rf"^{name}( |\.)"):
                attribution_grid(MODEL, IDS, DONOR, site="y", metric=metric, **given, **QUIET)
    with pytest.raises(InputError, match=r"^targets: token id 99 is outside"):
        align(MODEL, IDS, DONOR, [1, 99, 3], RESID, 1, **QUIET)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: edges(MODEL, 5), "config is a Mamba; give the MambaConfig of a model"),
        (lambda: decay_bands(MODEL, 0, "fast"), "bands='fast': a number of bands"),
        (lambda: decay_bands(MODEL, 0, 1.5), "bands=1.5: a number of bands"),
        (lambda: half_lives(MODEL, "mean"), "dt='mean' is no step size"),
    ],
)
def test_what_is_no_number_or_configuration(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_the_rank_of_an_array_is_that_of_a_tensor():
    samples = torch.randn(9, 4, dtype=torch.float64)
    assert torch.equal(effective_rank(samples.numpy()).participation, effective_rank(samples).participation)


METHODS = {
    "knockout": lambda m: knockout(m, IDS, Knockout(0, -1, 0)),
    "knockout_leak": lambda m: knockout_leak(m, IDS, Knockout(0, -1, 0)),
    "knockout_grid": lambda m: knockout_grid(m, IDS, metric, **QUIET),
    "collect": lambda m: collect(m, IDS, RESID),
    "probe_grid": lambda m: probe_grid(m, IDS, [0, 1, 0], site="y", **QUIET),
    "attribution_grid": lambda m: attribution_grid(m, IDS, DONOR, site="y", metric=metric, **QUIET),
    "path_patch": lambda m: path_patch(m, IDS, DONOR, [EDGE], metric, **QUIET),
    "edge_attribution": lambda m: edge_attribution(m, IDS, DONOR, metric),
    "faithfulness": lambda m: faithfulness(m, CIRCUIT, IDS, DONOR, metric, **QUIET),
    "align": lambda m: align(m, IDS, DONOR, [1, 2, 3], RESID, 1, **QUIET),
    "attention": lambda m: attention(m, IDS, layer=0),
    "receptive_field": lambda m: receptive_field(m, IDS, 0),
    "gradient_field": lambda m: gradient_field(m, IDS, metric),
    "half_lives": half_lives,
    "typical_dt": typical_dt,
    "HookedMamba": HookedMamba,
    "logit_lens": lambda m: logit_lens(m, IDS),
    "direct_logit": lambda m: direct_logit(m, IDS, 3),
    "state_lens": lambda m: state_lens(m, IDS, 3),
    "tuned_lens": lambda m: tuned_lens(m, IDS, **QUIET),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_says_what_is_no_model(method):
    for wrong in ("state-spaces/mamba-130m", HookedMamba(MODEL), MODEL.config):
        with pytest.raises(InputError, match=f"model is a {type(wrong).__name__}; give a Mamba"):
            METHODS[method](wrong)


def test_what_one_method_makes_is_not_taken_for_what_another_makes():
    effects = edge_attribution(MODEL, IDS, DONOR, metric)
    for call, text in (
        (lambda: steering_curve(MODEL, IDS, RUN.logits[0, 0], metric, [1.0]), "direction is a Tensor; give the Dir"),
        (lambda: contrast("resid_post", RUN.logits, RUN.logits), "place is a str; give the Address"),
        (lambda: prune(CIRCUIT, keep=3), r"effects\[0\] is a Circuit; give the EdgeEffects"),
        (lambda: prune([effects], keep=3), r"effects\[0\] is a list; give the EdgeEffects"),
        (lambda: faithfulness(MODEL, effects, IDS, DONOR, metric), r"circuits\[0\] is a EdgeEffects; give the Circuit"),
        (lambda: faithfulness(MODEL, [EDGE], IDS, DONOR, metric), r"circuits\[0\] is a Edge; give the Circuit"),
    ):
        with pytest.raises(InputError, match=text):
            call()

"""The harness lets what is right pass, compares any two, and keeps what it found."""

import dataclasses
import functools
import importlib
import json

import pytest
import torch
from forks import CONFIG, ask, failed, model, plain, swapped
from helpers import slow
from transformers.utils import ModelOutput
from typer.testing import CliRunner

from kernels_bridge import resolve
from kernels_bridge.__main__ import app
from kernels_bridge.harness import Ours, Theirs, bisect, check, target
from kernels_bridge.harness.check import SHORT, Report
from kernels_bridge.harness.draw import ODD, SMALL, draw_edits, draw_ids, draw_model
from kernels_bridge.harness.rows import compare, errors, table
from kernels_bridge.harness.targets import reference
from kernels_bridge.harness.theirs import FALCON_NORMS, hf_cache
from minimal_mamba import Ops
from minimal_mamba.errors import BackendUnavailable, CheckpointError, InputError
from minimal_mamba.sites import SITES

RUNNER = CliRunner()


# -- what is right passes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *slow(torch.float64, torch.float16)])
def test_the_torch_backend_passes(dtype):
    weights = draw_model(SMALL, 0).to(dtype)  # wide enough for 16-bit rounding to average
    report = check(target("torch", weights), weights, lengths=[5, 17], progress=False)
    assert report.passed and report.first is None, table(report.rows)
    assert {r.kind for r in report.rows} == set(report.settings["kinds"])
    named = {"conv", "u", "dt", "B", "C", "y", "ssm_state", "resid_post", "logits", "loss", "d embed"}
    assert named <= {r.quantity for r in report.rows}
    assert report.unseen == []


@pytest.mark.parametrize(("kind", "most"), [("layers", 4), ("mixers", 4), ("model", 8), ("edits", 8), ("gradients", 8)])
def test_a_rounding_of_a_whole_model_is_known_from_more(kind, most, monkeypatch):
    """It goes through every layer: of four, the readable model under a fifth was out of its bound in 3 of 90 cases (the
    shipped model in bfloat16, two rows of five tokens), of eight in 1. A fault of one channel needs the closer bound.
    """
    module, asked = importlib.import_module("kernels_bridge.harness.check"), []
    real = module.roundings

    def counted(*how):
        asked.append(0)
        for one in real(*how):
            asked[-1] += 1
            yield one

    monkeypatch.setattr(module, "roundings", counted)
    bad = Ours(model(torch.bfloat16), Ops("mine", resolve("torch").conv, swapped))
    assert not ask(bad, bad.model, kinds=[kind]).passed
    assert max(asked) == most


def test_another_rounding_is_asked_for_where_one_has_failed(monkeypatch):
    """It can only widen a bound, so a verdict is what all of them would give."""
    module, made = importlib.import_module("kernels_bridge.harness.check"), []
    real = module.roundings

    def counted(*how):
        for one in real(*how):
            made.append(one)
            yield one

    monkeypatch.setattr(module, "roundings", counted)
    weights = draw_model(SMALL, 0).float()
    assert ask(target("torch", weights), weights, kinds=["model", "gradients"]).passed
    asked = len(made)
    made.clear()
    bad = Ours(weights, Ops("mine", resolve("torch").conv, swapped))
    assert not ask(bad, weights, kinds=["model", "gradients"]).passed
    assert len(made) > 4 * asked - 1

    *_, moved = real(weights)
    other = Ours(weights, moved.ops, "the readable model, of weights moved by a last place")
    monkeypatch.setattr(other, "forward", moved.forward)
    monkeypatch.setattr(other, "gradients", moved.gradients)
    assert ask(other, weights, kinds=["model", "gradients"]).passed


@pytest.mark.parametrize(("eps", "norms"), [(None, None), (1e-6, "modules"), (1e-6, "functions")])
def test_transformers_passes_but_for_its_padding(eps, norms):
    """The state goes on over pad tokens there (transformers #48256); the logits of real tokens are right."""
    weights = draw_model(dataclasses.replace(CONFIG, mixer_rms_eps=eps), 0).float()
    theirs = target("hf", weights)
    for mixer in [layer.mixer for layer in theirs.layers] if norms else ():
        for name in FALCON_NORMS.values():
            if not hasattr(mixer, name):  # transformers before 5.15
                norms = "functions"
            elif norms == "functions":
                norm = getattr(mixer, name)
                function = functools.partial(type(norm).forward, norm)
                function.weight = norm.weight  # the mixer hands it to its kernels' path
                delattr(mixer, name)
                setattr(mixer, name, function)
    report = ask(theirs, weights, kinds=["layers", "model", "gradients", "decoding"])
    assert report.passed
    normed, seen = {"dt_low", "B", "C"}, {r.quantity for r in report.rows}
    if norms == "functions":
        assert not normed & seen and normed <= set(report.unseen) and {"x", "u", "gated"} <= seen
    else:
        assert normed <= seen and not normed & set(report.unseen)
    padded = ask(theirs, weights, kinds=["padding"])
    assert failed(padded) == {"last ssm_state", "last conv_state"}
    assert padded.first is None and "conv" in padded.unseen


# -- bisect -----------------------------------------------------------------------------------------------------------


def test_two_right_implementations_agree():
    found = bisect(plain(), "forks:plain")
    assert not found.parted and found.first is None
    assert "agree in all" in str(found) and {p.stage for p in found.parts} >= {
        "layers",
        "mixers",
        "model",
        "gradients",
        "decoding",
    }


@pytest.mark.parametrize(
    ("b", "error", "text"),
    [
        ("forks:other_weights", CheckpointError, "differs between the two"),
        ("forks:nothing", InputError, "returned a int"),
        ("forks:missing", InputError, "cannot be called"),
        ("no_such_module:f", InputError, "cannot be called"),
        ("torhc", BackendUnavailable, "Did you mean 'torch'"),
        (torch.nn.Linear(2, 2), CheckpointError, "Linear"),
        ("forks:compiled", CheckpointError, "that was compiled, its _orig_mod"),
    ],
)
def test_what_cannot_be_compared(b, error, text):
    with pytest.raises(error, match=text):
        bisect(plain(), b)


# -- the draw, the file, the command ----------------------------------------------------------------------------------


def test_the_drawn_edits_reach_every_site_and_the_state_always():
    sites, kinds = set(), set()
    for seed in range(60):
        edits = draw_edits(SMALL, 2, 9, seed)
        assert edits[0].address.site == "ssm_state"
        sites |= {e.address.site for e in edits}
        kinds |= {type(e).__name__ for e in edits}
    assert sites == set(SITES) - {"logits", "final_norm"}
    assert kinds == {"Set", "Add", "Scale", "Zero", "Mean", "Project"}


@pytest.mark.parametrize("config", [SMALL, ODD], ids=["small", "odd"])
def test_drawn_edits_leave_numbers_that_sixteen_bits_hold(config):
    """A dt below zero lets states explode; a norm of zeros, gradients: then float16 has no verdict."""
    exact = reference(draw_model(config, 0))
    for seed in range(60):
        l = 3 + seed % 4
        edits, ids = draw_edits(config, 2, l, seed), draw_ids(config, 2, l, seed)
        seen = exact.forward(ids, edits=edits) | exact.gradients(ids, edits)
        size = {key: float(x.abs().max()) for key, x in seen.items()}
        assert max(size.values()) < 3e4, (seed, max(size, key=size.get))


def test_a_check_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path, weights, kinds = tmp_path / "check.json", model(), ["operations", "edits", "model", "updated"]
    module = importlib.import_module("kernels_bridge.harness.check")  # the attribute of this name is the function
    real, ran = module.run_case, []

    def stopping(case, *rest):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(case.name)
        return real(case, *rest)

    monkeypatch.setattr(module, "run_case", stopping)
    with pytest.raises(KeyboardInterrupt):
        ask(target("torch", weights), weights, kinds=kinds, path=path)
    held = json.loads(path.read_text())
    assert held["verdict"] is None and list(held["cases"]) == ran

    again = []
    monkeypatch.setattr(module, "run_case", lambda case, *rest: again.append(case.name) or real(case, *rest))
    report = ask(target("torch", weights), weights, kinds=kinds, path=path)
    assert report.passed and not set(again) & set(ran)
    for kept, new in zip(report.rows, ask(target("torch", weights), weights, kinds=kinds).rows, strict=True):
        assert (kept.case, kept.kind, kept.quantity, kept.layer) == (new.case, new.kind, new.quantity, new.layer)
        assert kept.error == pytest.approx(new.error, rel=1e-3) and kept.passed == new.passed
        assert (kept.worst is None) == (new.worst is None)
    whole = json.loads(path.read_text())
    assert whole["verdict"] == "pass" and whole["provenance"]["packages"]["torch"] and len(whole["cases"]) == 8
    with pytest.raises(InputError, match="another weights"):
        ask(target("torch", model(seed=1)), model(seed=1), kinds=kinds, path=path)
    path.write_text("{")
    with pytest.raises(InputError, match="no check that can be gone on with"):
        ask(target("torch", weights), weights, kinds=kinds, path=path)


def test_the_commands(tmp_path):
    path = tmp_path / "c.json"
    told = RUNNER.invoke(
        app, ["check", "--target", "torch", "--lengths", "1,9", "--kinds", "layers,edits", "--json", str(path)]
    )
    assert told.exit_code == 0, told.output
    assert "PASS" in told.output and json.loads(path.read_text())["verdict"] == "pass"
    told = RUNNER.invoke(app, ["check", "--target", "hf", "--lengths", "9", "--kinds", "padding"])
    assert told.exit_code == 1 and "FAIL" in told.output
    told = RUNNER.invoke(app, ["check", "--target", "thorch"])
    assert told.exit_code == 2 and "Did you mean 'torch'" in told.output
    told = RUNNER.invoke(app, ["check", "--target", "torch", "--kinds", "sums"])
    assert told.exit_code == 2 and "no cases 'sums'" in told.output
    wrong = {"--json": str(path / "in"), "--lengths": "a,b", "--device": "gpu"}
    told_so = ("is a file", "between commas", "none that torch knows")
    for (option, value), says in zip(wrong.items(), told_so, strict=True):
        told = RUNNER.invoke(app, ["check", "--target", "torch", option, value])
        assert told.exit_code == 2 and says in told.output
    told = RUNNER.invoke(app, ["bisect", "reference", "torch", "--length", "5"])
    assert told.exit_code == 0 and "agree in all" in told.output
    assert "torch" in RUNNER.invoke(app, ["backends"]).output


def test_edits_of_every_site_are_in_a_check():
    for seed in (0, 1, 7):
        edits = [e for i in range(len(SHORT)) for e in draw_edits(SMALL, 2, 9, seed + i)]
        assert {e.address.site for e in edits} == set(SITES) - {"logits", "final_norm"}


def test_a_finished_check_is_made_again(tmp_path):
    """The code of a target is not among what a file can be known by."""
    path, weights = tmp_path / "check.json", model()
    good = resolve("torch")
    assert check(Ours(weights, good, "mine"), weights, kinds=["model"], lengths=[5], path=path, progress=False).passed
    bad = Ours(weights, Ops("mine", good.conv, swapped))
    assert not check(bad, weights, kinds=["model"], lengths=[5], path=path, progress=False).passed
    assert json.loads(path.read_text())["verdict"] == "fail"


def test_frozen_weights_and_other_shapes_get_a_verdict():
    weights = model()
    frozen = plain()
    frozen.backbone.layers[0].mixer.D.requires_grad_(False)
    report = ask(Theirs(frozen, "fork"), weights, kinds=["gradients"])
    assert report.passed and report.unseen[-1] != "d mixer.D"  # the other layer's is seen
    for p in frozen.parameters():
        p.requires_grad_(False)
    report = ask(Theirs(frozen, "fork"), weights, kinds=["gradients"])
    assert report.passed and {"d mixer.D", "d backbone.embedding.weight"} <= set(report.unseen)

    short = plain()
    short.register_forward_hook(lambda module, args, out: out.__class__(logits=out.logits[:, -1:], **hf_cache(out)))
    report = check(Theirs(short, "fork"), weights, kinds=["layers"], lengths=[5], progress=False)
    assert report.first.site == "logits" and report.first.position is None


def test_hf_caches_are_known_by_either_name():
    """`cache_params`, or `cache` as transformers has it from 5.24 on: here each version under the other's name."""
    theirs = plain()
    names = {"cache", "cache_params"}
    (mine,) = hf_cache(theirs(torch.tensor([[1]]), use_cache=True))
    (other,) = names - {mine}
    theirs.register_forward_pre_hook(
        lambda module, args, more: (args, {mine if k == other else k: v for k, v in more.items()}), with_kwargs=True
    )
    theirs.register_forward_hook(lambda module, args, out: ModelOutput(logits=out.logits, **{other: out.get(mine)}))
    assert ask(Theirs(theirs, "renamed"), model(), kinds=["model", "decoding"]).passed


def held(found, same, true, dtype=torch.bfloat16):
    """The rows of what was found, `same` being the readable model's."""
    return compare("model, x", "model", found, [errors(same, true)], true, dtype)


def test_one_channel_of_many_is_enough():
    """In norm it is within the bound."""
    true = torch.ones(400, 3, dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    near, same = (true + 0.03 * torch.randn(true.shape, generator=rng) for _ in range(2))
    lost = near.clone()
    lost[7] = 0
    key = ("d mixer.dt_proj.weight", 0)
    right, wrong = (held({key: x}, {key: same}, {key: true})[0] for x in (near, lost))
    assert right.passed and not wrong.passed and wrong.error < wrong.bound


def test_a_position_is_not_held_to_what_a_parameter_may_err():
    """A token that the embedding hardly gives a gradient may be off in it by all of its size."""
    rng = torch.Generator().manual_seed(0)
    true = {
        ("d embed", None): torch.ones(2, 200, 3).double(),
        ("d backbone.embedding.weight", None): torch.ones(9, 3).double(),
    }
    same = {key: x + 0.01 * torch.randn(x.shape, generator=rng) for key, x in true.items()}
    same["d backbone.embedding.weight", None][4] = 0
    found = {key: x.clone() for key, x in same.items()}
    found["d embed", None][1, 7] = 0
    rows = {r.quantity: r for r in held(found, same, true)}
    assert rows["d backbone.embedding.weight"].passed
    assert rows["d embed"].error < rows["d embed"].bound and not rows["d embed"].passed


def test_a_channel_of_small_states_is_held_to_its_own_size():
    """As one of short steps has: beside the others' it is nothing, in norm."""
    rng = torch.Generator().manual_seed(0)
    true = torch.randn(2, 8, 5, generator=rng, dtype=torch.float64)
    true[:, 3] *= 1e-3
    same = true * (1 + 1e-3 * torch.randn(true.shape, generator=rng))
    found = same.clone()
    found[:, 3] *= 1.2
    key = ("last ssm_state", 0)
    right, wrong = (held({key: x}, {key: same}, {key: true})[0] for x in (same, found))
    assert right.passed and not wrong.passed and wrong.error < wrong.bound
    blank = {key: torch.zeros(2, 8, 5).double()}  # a memory of nothing is right, and not divided by
    assert held(blank, blank, blank, torch.float32)[0].worst == 0


# -- what gives no verdict --------------------------------------------------------------------------------------------


def test_a_type_that_overflows_gets_no_verdict():
    """The readable model's error is infinite there, and so was the bound: a scan that gives nothing passed."""
    weights, good = draw_model(SMALL, 0), resolve("torch")
    with torch.no_grad():
        weights.backbone.layers[0].mixer.out_proj.weight.mul_(3e4)
    weights = weights.to(torch.float16)

    def nothing(u, dt, A, B, C, h, *, tap):
        y, h = good.scan(u, dt, A, B, C, h, tap=tap)
        return 0 * y, h

    for fault in (good.scan, nothing):
        with pytest.raises(InputError, match=r"no verdict: in float16 .* not finite"):
            check(Ours(weights, Ops("x", good.conv, fault)), weights, kinds=["model"], lengths=[5], progress=False)


def test_rows_that_cannot_fail_are_counted_as_such():
    true = {("logits", None): torch.ones(2, 5, 3).double()}
    rng = torch.Generator().manual_seed(0)
    same = {key: x + torch.randn(x.shape, generator=rng) for key, x in true.items()}
    lost = {key: 0 * x for key, x in true.items()}
    rows = held(lost, same, true)
    report = Report("x", rows, None, {}, [], {})
    assert rows[0].passed and not rows[0].telling and not report.passed
    assert report.mute == {"model": 1} and report.verdict == "none" and "says nothing" in table(rows)
    clear = held(true, true, true)
    both = Report("x", rows + clear, None, {}, [], {})
    assert both.passed and both.mute == {"model": 1} and both.verdict == "pass"
    assert not Report("x", rows + held(lost, true, true), None, {}, [], {}).passed


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (["check", "--target", "torch", "--lengths", "0"], "one token at least"),
        (["check", "--target", "torch", "--batch", "0"], "one row at least"),
        (["check", "--target", "torch", "--lengths", "5,,"], "whole numbers"),
        (["check", "--target", "torch", "--device", "foo"], "none that torch knows"),
        (["check", "--target", "torch", "--device", "meta"], "float64"),
        (["check", "--target", "torch", "--lengths", "3", "--kinds", "model", "--json", "{folder}"], "is no file"),
        (["check", "--target", "torch", "--lengths", "3", "--kinds", "model", "--json", "/proc/x.json"], "/proc"),
        (["bisect", "torch", "forks:raises"], "RuntimeError: no weights here"),
        (["bisect", "torch", ":x"], "cannot be called"),
        (["bisect", "torch", "forks:in_a_tuple", "--length", "3"], "without .logits"),
        (["bisect", "torch", "forks:without_a_cache", "--length", "3"], "no cache"),
        (["backends", "--device", "foo"], "none that torch knows"),
    ],
)
def test_what_ends_without_a_verdict_has_its_status(command, text, tmp_path):
    """1 says that something was compared and parts."""
    told = RUNNER.invoke(app, [part.format(folder=tmp_path) for part in command])
    assert told.exit_code == 2 and text in told.output, told.output


def test_a_fork_whose_mixer_gives_more_beside(tmp_path):
    assert not bisect(plain(), "forks:mixer_in_a_tuple", length=3, batch=2).parted

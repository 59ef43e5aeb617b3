"""Nothing is silent: what cannot be done raises its own error, which says what was asked and what is true here."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from helpers import tiny

from interp import Add, Apply, Mean, Project, Scale, Set, Zero, at, generate, gradients, run
from kernels_bridge import torch_ops
from minimal_mamba import Plan
from minimal_mamba.errors import (
    AddressError,
    BackendUnavailable,
    ConfigError,
    EditError,
    InputError,
    MambascopeError,
    NotReached,
    NotRecorded,
    ShapeMismatch,
    UnknownSiteError,
)
from minimal_mamba.scan import READABLE, causal_conv, selective_scan

MODEL = tiny()
CONFIG = MODEL.config
IDS = torch.randint(0, 29, (3, 7), generator=torch.Generator().manual_seed(0))
BUILTIN = {
    AddressError: IndexError,
    BackendUnavailable: RuntimeError,
    ConfigError: ValueError,
    EditError: ValueError,
    InputError: ValueError,
    NotReached: RuntimeError,
    NotRecorded: KeyError,
    ShapeMismatch: ValueError,
    UnknownSiteError: AttributeError,
}


def fails(error, text, call, *args, **kwargs):
    """It raises this error, which is ours and the builtin that one would expect, with a text that matches."""
    with pytest.raises(error, match=text) as caught:
        call(*args, **kwargs)
    assert type(caught.value) is error
    assert isinstance(caught.value, MambascopeError)
    assert isinstance(caught.value, BUILTIN[error])
    assert str(caught.value) == caught.value.args[0]  # a KeyError would show it in quotes


def test_names():
    fails(
        UnknownSiteError,
        r"no site 'ssm_stat'\. Did you mean 'ssm_state'\? All: embed, .*recurrent_state",
        getattr,
        at,
        "ssm_stat",
    )
    fails(UnknownSiteError, r"no site 'hook_h'", getattr, at, "hook_h")
    fails(UnknownSiteError, r"ssm_state has no field 'position'\..* It has layer, pos, e, n", at.ssm_state, position=3)
    fails(UnknownSiteError, r"u has no field 'layers'\. Did you mean 'layer'\? It has layer, pos, e", at.u, layers=3)
    fails(UnknownSiteError, r"embed has no field 'layer'\..* It has pos, d", at.embed, layer=0)
    fails(UnknownSiteError, r"recurrent_state has no field 'n'\..* It has layer, pos, e", at.recurrent_state, n=0)
    fails(AddressError, r"at\.y\(0, 7\): name the fields, as in at\.y\(layer=0, pos=7\)\. It has", at.y, 0, 7)
    fails(AddressError, r"at\.embed\(slice.*as in at\.embed\(pos=slice\(1, 2, None\)\)", at.embed, slice(1, 2))
    assert not hasattr(at, "nothing")


def test_selectors():
    fails(AddressError, r"pos=1\.5: give an int, a slice or a list of ints", at.u, pos=1.5)
    fails(AddressError, r"layer=True: give an int", at.u, layer=True)
    fails(AddressError, r"e='3': give an int", at.u, e="3")
    fails(AddressError, r"pos=None: give an int", at.u, pos=None)
    fails(AddressError, r"pos=\[\]: a list holds at least one int", at.u, pos=[])
    fails(AddressError, r"pos=\[1, 1\] names the same index twice", at.u, pos=[1, 1])
    fails(AddressError, r"a slice's step is positive", at.u, pos=slice(None, None, -1))
    fails(AddressError, r"a slice is between ints", at.u, pos=slice(0.5, None))
    fails(AddressError, r"e=b'ab': give an int", at.u, e=b"ab")


def test_selectors_of_torch_and_numpy():
    for three in (torch.tensor(3), np.int64(3), np.array(3)):
        assert at.x(pos=three) == at.x(pos=3)
        assert at.x(pos=slice(three, None)) == at.x(pos=slice(3, None))
    for many in (torch.tensor([3, -1]), np.array([3, -1]), [np.int64(3), torch.tensor(-1)]):
        assert at.x(pos=many, layer=many) == at.x(pos=[3, -1], layer=[3, -1])
        assert Zero(at.x(), rows=many) == Zero(at.x(), rows=[3, -1])
    assert at.x(pos=torch.tensor([3])) == at.x(pos=[3])  # a list of one keeps its axis
    for mask in (True, np.True_, torch.tensor(True), torch.tensor([True, False]), np.array([False, True]), [True]):
        fails(AddressError, r"pos=\w+: give an int, .* not bools; of a mask its indices", at.x, pos=mask)
        fails(AddressError, r"rows=\w+: give an int, .* not bools", Zero, at.x(), rows=mask)
    for other in (torch.tensor(3.0), np.array([1.5]), torch.tensor([[1, 2]])):
        fails(AddressError, r"pos=.*(give an int|ints only)", at.x, pos=other)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("wrap", ["edit", "record"])
@pytest.mark.parametrize("site", ["ssm_state", "u", "recurrent_state", "conv_state"])
def test_places_that_this_run_does_not_have(site, wrap, backend):
    def go(lengths=None, **fields):
        place = getattr(at, site)(**({"layer": 0} | fields))
        edits, record = ([Zero(place)], []) if wrap == "edit" else ([], [place])
        run(MODEL, IDS, edits, record, backend, lengths=lengths)

    name = rf"{site}\("
    fails(AddressError, name + r".*layer=3 does not exist here: there are indices 0\.\.2", go, layer=3)
    fails(AddressError, name + r".*layer=-4 does not exist here", go, layer=-4)
    fails(
        AddressError,
        name + r".*layer: the slice 3: selects nothing; there are indices 0\.\.2",
        go,
        layer=slice(3, None),
    )
    fails(AddressError, name + r".*row 0 has no position 7; this run has its positions 0\.\.6", go, pos=7)
    fails(AddressError, name + r".*row 0 has no position -1; this run has its positions 0\.\.6", go, pos=-8)
    fails(AddressError, name + r".*row 1 has no position 4; this run has its positions 0\.\.3", go, [7, 4, 5], pos=4)
    fails(
        AddressError,
        name + r".*slice 7: selects nothing of row 0; this run has its positions 0\.\.6",
        go,
        pos=slice(7, None),
    )
    fails(AddressError, name + r".*slice 5: selects nothing of row 1", go, [7, 4, 6], pos=slice(5, None))
    fails(AddressError, name + r".*names the same position of row 0 twice", go, pos=[6, -1])
    fails(
        AddressError,
        name + r".*row 1 has no position -1|.*names the same position of row 1 twice",
        go,
        [7, 4, 5],
        pos=[3, -1],
    )
    fails(AddressError, name + r".*e=24 does not exist here: there are indices 0\.\.23", go, e=24)
    fails(AddressError, name + r".*e=\[1, -23\] names the same index twice", go, e=[1, -23])
    fails(AddressError, name + r".*e: the slice 24: selects nothing", go, e=slice(24, None))
    if site == "ssm_state":
        fails(AddressError, name + r".*n=5 does not exist here: there are indices 0\.\.4", go, n=5)


def test_rows_that_this_run_does_not_have():
    for rows, text in (
        (3, r"row=3 does not exist here: there are indices 0\.\.2"),
        ([0, -3], "names the same index twice"),
        (slice(3, None), "row: the slice 3: selects nothing"),
    ):
        fails(AddressError, r"Zero\(u\(.*" + text, run, MODEL, IDS, [Zero(at.u(layer=0), rows=rows)])
    fails(AddressError, "a list holds at least one int", Zero, at.u(), rows=[])


def test_positions_before_a_carried_state():
    first = run(MODEL, IDS[:, :3], keep_state=True)
    for pos in (2, -5):
        fails(
            AddressError,
            r"this run has its positions 3\.\.6",
            run,
            MODEL,
            IDS[:, 3:],
            [Zero(at.u(pos=pos))],
            state=first.state,
        )
    fails(
        AddressError,
        r"selects nothing of row 0; this run has its positions 3\.\.6",
        run,
        MODEL,
        IDS[:, 3:],
        [Zero(at.u(pos=slice(3)))],
        state=first.state,
    )


def test_positions_that_generation_does_not_reach():
    fails(AddressError, r"this run has its positions 0\.\.9", generate, MODEL, IDS, 4, [Zero(at.u(pos=10))])


def test_shapes_that_do_not_fit():
    v = torch.zeros
    cases = [
        (at.u(layer=0, pos=2), v(3, 23), r"the value is \(3, 23\); the place is \(3, 24\)"),
        (at.u(layer=0, pos=2), v(2, 24), r"the value is \(2, 24\); the place is \(3, 24\)"),
        (at.u(layer=0, pos=2), v(3, 1, 24), r"the place is \(3, 24\)"),
        (at.u(layer=0, pos=2), v(3), r"the value is \(3,\); the place is \(3, 24\)"),
        (at.u(layer=0), v(7, 24), r"the place is \(3, 7, 24\)"),
        (at.ssm_state(layer=0, pos=2), v(5, 24), r"the place is \(3, 24, 5\).* or \(24, 5\) for all rows"),
        (at.ssm_state(pos=2), v(2, 3, 24, 5), r"the place is \(3, 3, 24, 5\)"),
        (at.ssm_state(layer=[0], pos=2), v(3, 24, 5), r"the place is \(1, 3, 24, 5\)"),
        (at.ssm_state(layer=0, pos=2, e=[1, 2]), v(3, 24, 5), r"the place is \(3, 2, 5\)"),
        (at.recurrent_state(layer=0, pos=2), v(3, 24, 5), r"the place is \(3, 24, 8\)"),
    ]
    for place, value, text in cases:
        for kind in (Set, Add, Scale, Mean):
            fails(ShapeMismatch, rf"{kind.__name__}\({place.site}\(.*" + text, run, MODEL, IDS, [kind(place, value)])
    fails(ShapeMismatch, r"the place is \(2, 24\)", run, MODEL, IDS, [Set(at.u(layer=0, pos=2), v(3, 24), rows=[0, 2])])
    fails(
        ShapeMismatch,
        r"a basis here is \(m, 24\); this one is \(2, 5\)",
        run,
        MODEL,
        IDS,
        [Project(at.u(layer=0), torch.eye(2, 5))],
    )


def test_edits_without_a_meaning():
    fails(EditError, r"Set\(u\(layer=0.*the value holds NaN \(1 of 1 numbers\)", Set, at.u(layer=0), float("nan"))
    apart = [float("inf"), -float("inf")]  # their sum is NaN, they are not
    assert Set(at.u(layer=0, e=[0, 1]), apart).to.isinf().all()
    fails(EditError, r"the value holds NaN \(1 of 3 numbers\)", Set, at.u(layer=0, e=[0, 1, 2]), [*apart, float("nan")])
    fails(
        EditError,
        r"Mean\(u.*the mean over a batch of one row changes nothing",
        run,
        MODEL,
        IDS[:1],
        [Mean(at.u(layer=0))],
    )
    for site in ("ssm_state", "conv_state"):
        edit = Mean(getattr(at, site)(layer=0, pos=-1))
        fails(
            EditError,
            rf"Mean\({site}.*the rows reach this position at different times",
            run,
            MODEL,
            IDS,
            [edit],
            lengths=[7, 4, 5],
        )
    place = at.u(layer=0, pos=1)
    for kind in (Set, Add, Scale, Project):
        fails(EditError, rf"{kind.__name__}\(u.*None is no real tensor or number", kind, place, None)
    for value, why in (
        ("a", "'a' is no real tensor"),
        ([torch.ones(2), torch.ones(3)], "stack expects each tensor to be equal size"),
        ([[1.0], [1.0, 2.0]], "expected sequence of length 1"),
        (1j, "complex"),
        (torch.ones(2, dtype=torch.complex64), "it is complex"),
        (np.ones(2) * 1j, "it is complex"),
    ):
        fails(EditError, r"Set\(u(.|\n)*" + why, Set, place, value)
    for fn in (None, 3):
        fails(EditError, rf"Apply: {fn} is no function", Apply, place, fn)
    fails(EditError, r"Project: keep=\[0\] is no bool", lambda: Project(place, torch.eye(1, 24), keep=[0]))
    with pytest.raises(TypeError, match="positional"):
        Project(place, torch.eye(1, 24), True)
    ragged = [Mean(at.u(layer=0, pos=5))]
    fails(EditError, r"Mean\(u.*in different calls of the model", generate, MODEL, IDS, 3, ragged, lengths=[7, 4, 5])
    for made, got in (
        (lambda x: x[:1], r"\(1, 24\)"),
        (lambda x: None, "NoneType"),
        (torch.isnan, r".*torch\.bool; its type"),
    ):
        fails(
            EditError,
            r"Apply\(u.*must return shape \(3, 24\), it returned " + got,
            run,
            MODEL,
            IDS,
            [Apply(at.u(layer=0, pos=1), made)],
        )
    fails(EditError, "'u' is neither an edit nor an address", run, MODEL, IDS, ["u"])
    fails(EditError, "is neither an edit nor an address", run, MODEL, IDS, [], ["u"])
    for wrong in (None, "ssm_state", at.u, [[at.u()]]):
        fails(EditError, "is neither an edit nor an address", run, MODEL, IDS, (), wrong)
        fails(EditError, "is neither an edit nor an address", gradients, MODEL, IDS, lambda x: x[:, -1, 0], wrong)


# -- a backend that passes something over -------------------------------------------------------------------------


def deaf_scan(*args, tap, **kwargs):
    return selective_scan(*args, **kwargs)


def deaf_conv(*args, tap, **kwargs):
    return causal_conv(*args, **kwargs)


@pytest.mark.parametrize(
    ("ops", "sites"),
    [
        (
            dataclasses.replace(READABLE, scan=deaf_scan),
            ["decay", "state_write", "ssm_state", "state_read", "recurrent_state"],
        ),
        (dataclasses.replace(READABLE, conv=deaf_conv), ["conv_state", "recurrent_state"]),
        (dataclasses.replace(torch_ops.TORCH, scan=deaf_scan), ["ssm_state", "state_read"]),
    ],
)
def test_what_was_asked_for_and_did_not_happen(monkeypatch, ops, sites):
    for module in ("interp.run", "interp.generation"):
        monkeypatch.setattr(sys.modules[module], "resolve", lambda *args: ops)
    for site in sites:
        place = getattr(at, site)(layer=1, pos=[2, 4])
        fails(
            NotReached,
            rf"edit Add\({site}\(layer=1, pos=\[2, 4\]\).* happened at 0 of 6 places",
            run,
            MODEL,
            IDS,
            [Add(place, 1.0)],
        )
        fails(
            NotReached,
            rf"recording {site}\(layer=1, pos=\[2, 4\]\) happened at 0 of 6 places",
            run,
            MODEL,
            IDS,
            [],
            [place],
        )
        fails(NotReached, r"happened at 0 of 6 places", gradients, MODEL, IDS, lambda x: x[:, -1, 0], [place])
    fails(NotReached, "edit", generate, MODEL, IDS, 2, [Add(getattr(at, sites[0])(layer=0, pos=1), 1.0)])
    run(MODEL, IDS, [Add(at.u(layer=1), 1.0)], [at.y(layer=1)])  # what it does not pass over still works


def test_an_edit_that_happens_at_some_places_only():
    """A backend that offers every second position, and a caller that stops early."""

    def every_second(u, dt, A, B, C, h, *, tap):
        class Half(type(tap)):
            def __init__(self):
                self.__dict__ = tap.__dict__

            def __call__(self, site, value, t=None):
                return super().__call__(site, value, t) if t is None or t % 2 == 0 else value

        return selective_scan(u, dt, A, B, C, h, tap=Half())

    zero = torch.zeros(3, dtype=torch.long)
    for source in (Zero(at.ssm_state(layer=0, pos=[1, 2])), at.ssm_state(layer=0, pos=[1, 2])):
        edits, record = ([source], []) if isinstance(source, Zero) else ([], [source])
        plan = Plan(CONFIG, edits, record, zero, zero + 7)
        MODEL(IDS, tap=plan, ops=dataclasses.replace(READABLE, scan=every_second))
        fails(NotReached, "happened at 3 of 6 places", plan.results)
    plan = Plan(CONFIG, [Zero(at.u(layer=0))], [], zero, zero + 7)
    MODEL(IDS[:, :4], tap=plan)
    fails(NotReached, r"Zero\(u\(layer=0, pos=:\)\) happened at 12 of 21 places", plan.results)


def test_a_plan_that_serves_two_runs():
    zero = torch.zeros(3, dtype=torch.long)
    plan = Plan(CONFIG, [Zero(at.u(layer=0, pos=1))], [at.y(layer=1)], zero, zero + 7)
    for _ in range(2):
        MODEL(IDS, tap=plan)
    fails(NotReached, r"Zero\(.* more often than expected, 6 times at 3 places .* serves one run", plan.results)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("site", "big"), [("u", 1e6), ("logits", 1e6), ("ssm_state", 1e46)])  # the state is float32
def test_a_value_that_is_finite_until_it_is_cast(site, big, backend):
    model, place = tiny(dtype=torch.float16), getattr(at, site)(pos=2)
    says = r"finite value, up to 1e\+\d\d, is infinite in this place's type torch\.float\d\d"
    for edit in (
        Set(place, big),
        Add(place, torch.tensor(-big, dtype=torch.float64)),
        Apply(place, lambda x: x.double() * 0 + big),
    ):
        fails(EditError, says, run, model, IDS, [edit], [], backend)
    run(model, IDS, [Set(place, float("inf")), Set(place, 6e4), Apply(place, lambda x: x * torch.nan)], [], backend)


def test_reading_what_was_not_recorded():
    out = run(MODEL, IDS, record=[at.u(layer=1, pos=2)])
    fails(
        NotRecorded,
        r"u\(layer=1, pos=3\) was not recorded; this run recorded u\(layer=1, pos=2\)",
        lambda: out[at.u(layer=1, pos=3)],
    )
    fails(NotRecorded, "this run recorded nothing", lambda: run(MODEL, IDS)[at.u()])


def test_inputs():
    big = IDS.clone()
    for token, text in (
        (29, r"token id 29 is outside the vocabulary 0\.\.28 \(rows up to 31 are padding\)"),
        (32, r"token id 32 is outside"),
        (-1, r"token id -1 is outside the vocabulary 0\.\.28"),
    ):
        big[1, 2] = token
        fails(InputError, text, run, MODEL, big)
        fails(InputError, text, generate, MODEL, big, 2)
    for shape in ((0, 5), (2, 0)):
        fails(
            InputError,
            r"it is \(batch, length\) with at least one token",
            run,
            MODEL,
            torch.zeros(shape, dtype=torch.long),
        )
    fails(InputError, r"ids has shape \(3,\)", run, MODEL, IDS[:, 0])
    fails(InputError, r"ids has type torch.float32; token ids are integers", run, MODEL, IDS.float())
    for lengths in ([7, 7], [7, 0, 7], [7, 8, 7], [[7, 7, 7]], [1.0, 2.0, 3.0], []):
        fails(InputError, r"lengths=.*give one int of 1\.\.7 a row, for 3 rows", run, MODEL, IDS, lengths=lengths)
    state = run(MODEL, IDS, keep_state=True).state
    fails(
        InputError,
        r"state.ssm_state has shapes .*\(3, 24, 5\).* this run has \(2, 24, 5\) in 3",
        run,
        MODEL,
        IDS[:2],
        state=state,
    )
    fewer = dataclasses.replace(state, conv_state=state.conv_state[:2])
    fails(
        InputError,
        r"state.conv_state has shapes .* in 2 layers; this run has \(3, 24, 3\) in 3",
        run,
        MODEL,
        IDS,
        state=fewer,
    )


def test_backends():
    fails(
        BackendUnavailable,
        r"no backend 'torc'\. Did you mean 'torch'\? There are auto, reference, torch, compiled, fused",
        run,
        MODEL,
        IDS,
        backend="torc",
    )
    fails(
        BackendUnavailable,
        r"backend='fused' cannot run on cpu: it lacks .*CUDA.*Here: reference, torch",
        run,
        MODEL,
        IDS,
        backend="fused",
    )
    fails(BackendUnavailable, "backend='fused' cannot run", generate, MODEL, IDS, 2, backend="fused")


def test_errors_come_before_anything_runs(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the model ran")

    monkeypatch.setattr(type(MODEL), "forward", never)
    fails(AddressError, "no position", run, MODEL, IDS, [Zero(at.u(pos=7))])
    fails(ShapeMismatch, "the place is", run, MODEL, IDS, [Set(at.u(layer=0), torch.zeros(2))])
    fails(EditError, "changes nothing", run, MODEL, IDS[:1], [Mean(at.u())])
    fails(BackendUnavailable, "lacks", run, MODEL, IDS, backend="fused")
    fails(AddressError, "does not exist here", gradients, MODEL, IDS, lambda x: x[:, -1, 0], [at.u(layer=9)])

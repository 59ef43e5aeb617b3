"""What a run returns, and that nothing done to it changes another run."""

import copy
import pickle

import pytest
import torch
from helpers import slow, tiny

from interp import (
    Add,
    Apply,
    Edge,
    Mean,
    Project,
    Scale,
    Set,
    Zero,
    at,
    edge_attribution,
    generate,
    gradients,
    logit_diff,
    patch_grid,
    run,
)
from kernels_bridge import resolve
from kernels_bridge.backends import BACKENDS
from minimal_mamba import MambaState, Plan
from minimal_mamba.errors import EditError, InputError, NotRecorded

BOTH = pytest.mark.parametrize("backend", ["reference", "torch"])
HERE = ["reference", *(n for n in ("torch", "compiled") if not BACKENDS[n].missing(torch.device("cpu")))]
ALL = pytest.mark.parametrize("backend", HERE)
MODEL = tiny(seed=9)
CONFIG = MODEL.config
IDS = torch.randint(0, 29, (3, 8), generator=torch.Generator().manual_seed(0))
PLACES = [
    at.ssm_state(layer=1, pos=3),
    at.u(layer=0),
    at.conv_state(layer=2, pos=[-1]),
    at.logits(),
    at.embed(pos=0),
    at.resid_pre(layer=1),
    at.y(layer=2, pos=2),
    at.recurrent_state(pos=-1),
    at.state_read(layer=1, pos=3),
]


def close(a, b, tol=1e-11):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@BOTH
def test_recordings_hold_the_value_after_edits(backend):
    place = at.ssm_state(layer=1, pos=3)
    value = torch.randn(3, CONFIG.d_inner, CONFIG.d_state, dtype=torch.float64)
    with torch.no_grad():
        out = run(
            MODEL,
            IDS,
            [Set(place, value), Scale(at.u(layer=0, pos=2), 0.0)],
            record=[place, at.u(layer=0)],
            backend=backend,
        )
    assert torch.equal(out[place], value)
    assert not out[at.u(layer=0)][:, 2].any()
    assert out[at.u(layer=0)][:, 3].all()


@ALL
def test_changing_what_a_run_gave_changes_no_run(backend):
    ids = IDS.clone()
    with torch.no_grad():
        kept = run(MODEL, ids, record=PLACES, keep_state=True, backend=backend)
        before = {a: kept[a] for a in PLACES}
        state = [t.clone() for t in (*kept.state.ssm_state, *kept.state.conv_state)]
        later = run(MODEL, IDS[:, :3], state=kept.state, backend=backend).logits
        for a in PLACES:
            kept[a].fill_(99)  # what run_[a] gives is a copy
            kept.records[a].fill_(77)  # and what it copies is nobody else's
        logits = kept.logits.clone()
        assert all(
            torch.equal(a, b) for a, b in zip(state, (*kept.state.ssm_state, *kept.state.conv_state), strict=True)
        )
        assert torch.equal(run(MODEL, IDS[:, :3], state=kept.state, backend=backend).logits, later)
        again = run(MODEL, IDS, record=PLACES, backend=backend)
        assert all(torch.equal(again[a], before[a]) for a in PLACES)
        assert torch.equal(again.logits, logits)
        assert torch.equal(again.logits, before[at.logits()])
        # the state that a run goes on from is not changed by it, not even under edits of its first position
        frozen = [t.clone() for t in (*kept.state.ssm_state, *kept.state.conv_state)]
        run(
            MODEL,
            IDS,
            [Zero(at.recurrent_state(pos=8)), Add(at.state_read(pos=8), 1.0)],
            state=kept.state,
            backend=backend,
        )
        assert all(
            torch.equal(a, b) for a, b in zip(frozen, (*kept.state.ssm_state, *kept.state.conv_state), strict=True)
        )


@BOTH
def test_reading_a_recording_twice_gives_two_tensors(backend):
    place = at.ssm_state(layer=0, pos=1)
    with torch.no_grad():
        out = run(MODEL, IDS, record=[place], backend=backend)
    out[place].zero_()
    assert out[place].abs().sum() > 1


@BOTH
def test_recordings_are_differentiable(backend):
    place, source = at.ssm_state(layer=2, pos=5, e=3, n=1), at.embed(pos=2)
    value = run(MODEL, IDS, record=[source], backend=backend)[source].detach()
    direction = torch.randn(value.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def read(v):
        return run(MODEL, IDS, [Set(source, v)], record=[place], backend=backend)[place].sum()

    leaf = value.clone().requires_grad_()
    (grad,) = torch.autograd.grad(read(leaf), leaf)
    with torch.no_grad():
        numeric = (read(value + 1e-6 * direction) - read(value - 1e-6 * direction)) / 2e-6
    assert numeric.abs() > 1e-5
    close((grad * direction).sum(), numeric, 1e-6)


@BOTH
def test_the_fields_of_a_run(backend):
    lengths = [8, 3, 5]
    with torch.no_grad():
        out = run(MODEL, IDS, lengths=lengths, backend=backend)
        with pytest.raises(NotRecorded, match="keep_state=True"):  # None, handed on, would start afresh
            out.state  # noqa: B018
        assert out.backend == backend
        assert torch.equal(out.ids, IDS)
        assert out.logits.shape == (3, 8, CONFIG.padded_vocab)
        assert out.lengths.tolist() == lengths
        assert torch.equal(out.last_logits, torch.stack([out.logits[i, n - 1] for i, n in enumerate(lengths)]))
        last = run(MODEL, IDS, lengths=lengths, backend=backend, last_only=True, keep_state=True)
        assert last.logits.shape == (3, 1, CONFIG.padded_vocab)
        close(last.logits[:, 0], out.last_logits)
        assert isinstance(last.state, MambaState)
        assert last.state.position.tolist() == lengths
        whole = run(MODEL, IDS, record=[at.final_norm(pos=0), at.logits(pos=2)], backend=backend, last_only=True)
        plain = run(MODEL, IDS, backend=backend)
        close(whole.logits, plain.logits[:, -1:])
        close(whole[at.logits(pos=2)], plain.logits[:, 2])
    assert run(MODEL, IDS).backend == resolve("auto", "cpu").name in ("torch", "compiled")


@BOTH
def test_the_ids_and_lengths_of_a_run_are_its_own(backend):
    ids, lengths = IDS.clone(), torch.tensor([8, 3, 5])
    with torch.no_grad():
        out = run(MODEL, ids, lengths=lengths, backend=backend)
    ids.zero_(), lengths.fill_(1)
    assert torch.equal(out.ids, IDS) and out.lengths.tolist() == [8, 3, 5]


def test_one_edit_or_address_need_be_in_no_list():
    place, edit = at.u(layer=1, pos=2), Zero(at.u(layer=0, pos=1))
    with torch.no_grad():
        one, several = run(MODEL, IDS, edit, place), run(MODEL, IDS, [edit], [place])
        assert torch.equal(one.logits, several.logits) and torch.equal(one[place], several[place])
        assert torch.equal(generate(MODEL, IDS, 2, edit, place)[place], one[place])
        assert one == one and one != several and len({one, several}) == 2
        for kwargs in ({"edits": place}, {"edits": [edit, place]}, {"record": edit}, {"record": [edit]}):
            with pytest.raises(EditError, match=r"is given where (edits and not addresses|addresses and not edits)"):
                run(MODEL, IDS, **kwargs)


PLACED = [
    Add(at.ssm_state(layer=1, pos=2), 0.5),
    Scale(at.recurrent_state(layer=0, pos=[1, -1]), 0.5),
    Set(at.u(layer=2, pos=3), torch.ones(CONFIG.d_inner)),
    Mean(at.z(layer=1, pos=0)),
    Project(at.resid_post(layer=0, pos=4), torch.eye(2, CONFIG.d_model)),
    Apply(at.y(layer=1, pos=5), torch.tanh),
]


@ALL
def test_with_gradients_without_them_and_in_inference_mode(backend):
    place = at.ssm_state(layer=2, pos=slice(2, None))

    def go():
        first = run(MODEL, IDS, PLACED, place, backend=backend, keep_state=True)
        return run(MODEL, IDS, state=first.state, backend=backend).logits, first.logits, first[place]

    wanted = go()
    assert wanted[0].requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = go()
            assert not found[0].requires_grad
            for a, b in zip(found, wanted, strict=True):
                close(a, b)
            generate(MODEL, IDS, 2, PLACED[:1], backend=backend)
    with torch.inference_mode():
        kept = run(MODEL, IDS, record=[place], backend=backend, keep_state=True)
    with torch.no_grad():  # what was made there can be used outside
        close(run(MODEL, IDS, Set(place, kept[place]), state=None, backend=backend).logits, kept.logits)
        run(MODEL, IDS, state=kept.state, backend=backend)


@ALL
def test_a_float16_model_under_edits(backend):
    model = tiny(seed=9, dtype=torch.float16)
    place = at.ssm_state(layer=1, pos=2)
    with torch.no_grad():
        half = run(model, IDS, PLACED, place, backend=backend, lengths=[8, 6, 7])
        full = run(MODEL, IDS, PLACED, place, backend=backend, lengths=[8, 6, 7])
        made = generate(model, IDS, 3, PLACED, backend=backend)
    assert half.logits.dtype == torch.float16 and half[place].dtype == torch.float32
    for a, b in ((half.logits, full.logits), (half[place], full[place])):
        assert (a.double() - b).norm() / b.norm() < 0.01
    assert made.logits.isfinite().all() and made.logits.dtype == torch.float16


def test_edits_and_addresses_go_through_pickle():
    for edit in PLACED:
        again = pickle.loads(pickle.dumps(edit))
        assert again == edit and hash(again) == hash(edit) and again.address == edit.address
        assert str(again) == str(edit)
    for place in PLACES:
        assert pickle.loads(pickle.dumps(place)) == place
    with torch.no_grad():
        again = pickle.loads(pickle.dumps(PLACED))
        assert torch.equal(run(MODEL, IDS, again).logits, run(MODEL, IDS, PLACED).logits)
        out = run(MODEL, IDS, record=PLACES)
        assert torch.equal(pickle.loads(pickle.dumps(out))[PLACES[0]], out[PLACES[0]])


@ALL
def test_what_torch_compile_wraps_runs_untraced(backend):
    """In a trace recordings are lost, and the loops of the fast backends fail."""

    def refuse(graph, inputs):
        raise AssertionError("traced")

    place, edge = at.ssm_state(layer=1, pos=2), Edge(at.B(layer=1, pos=2), at.state_write(layer=1, pos=2))

    def metric(logits):
        return logit_diff(logits, 3, 4)

    def numbers(model):
        yield run(model, IDS, Scale(place, 2.0), record=[place], backend=backend)[place]
        yield generate(model, IDS, 2, Scale(place, 2.0), backend=backend).logits
        yield gradients(model, IDS, metric, place, backend=backend)[place]
        yield edge_attribution(model, IDS, IDS.flip(0), metric, [edge], backend=backend).values
        yield patch_grid(
            model, IDS, IDS.flip(0), site="ssm_state", metric=metric, layers=[1], backend=backend, progress=False
        ).values

    for found, expected in zip(numbers(torch.compile(MODEL, backend=refuse)), numbers(MODEL), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ["torch", *slow("reference", "compiled")])
@pytest.mark.parametrize("before", [False, True])
def test_what_torch_compile_wraps_can_be_called_with_a_backend_s_operations(backend, before):
    """It had been torch's own internal error; then only where the first call of all had them."""
    torch.compiler.reset()
    model, ids = tiny(seed=9, n_layer=1, d_state=2), IDS[:, :3]  # a trace unrolls layers and tokens
    wrapped, ops = torch.compile(model, backend="eager"), resolve(backend, "cpu")
    place, start = at.ssm_state(layer=0, pos=2), torch.zeros(3, dtype=torch.long)
    with torch.no_grad():
        if before:
            assert torch.equal(wrapped(ids).logits, model(ids).logits)
        assert torch.equal(wrapped(ids, ops=ops).logits, model(ids, ops=ops).logits)
        plan = Plan(model.config, [Scale(place, 2.0)], [place], start, start + 3)
        found = wrapped(ids, tap=plan, ops=ops)
        one = run(model, ids, Scale(place, 2.0), place, backend)
        alone = Plan(model.config, [Scale(place, 2.0)], [place], start, start + 3)
        assert torch.equal(wrapped(ids, tap=alone).logits, model(ids, tap=alone).logits)
        assert torch.equal(wrapped(ids).logits, model(ids).logits)
    assert torch.equal(found.logits, one.logits) and torch.equal(plan.results()[place], one[place])
    torch.compiler.reset()


def test_a_copy_of_what_holds_tensors_is_one_or_says_why_not():
    place = at.ssm_state(layer=1, pos=2)
    with torch.no_grad():
        out = run(MODEL, IDS, record=place, keep_state=True)
    two = copy.deepcopy(out)
    assert type(two) is type(out) and torch.equal(two.logits, out.logits) and torch.equal(two[place], out[place])
    two.logits.zero_(), two.state.ssm_state[0].zero_()
    assert out.logits.any() and out.state.ssm_state[0].any()
    with_gradients = run(MODEL, IDS, keep_state=True)
    for one in (with_gradients, with_gradients.state):
        with pytest.raises(InputError, match=rf"deepcopy of a {type(one).__name__} .* make it under torch\.no_grad"):
            copy.deepcopy(one)


@ALL
def test_the_kept_state_goes_on(backend):
    with torch.no_grad():
        whole = run(MODEL, IDS, backend=backend, keep_state=True)
        first = run(MODEL, IDS[:, :5], backend=backend, keep_state=True)
        second = run(MODEL, IDS[:, 5:], backend=backend, state=first.state, keep_state=True)
    close(second.logits, whole.logits[:, 5:])
    for a, b in zip(
        second.state.ssm_state + second.state.conv_state, whole.state.ssm_state + whole.state.conv_state, strict=True
    ):
        close(a, b)
    assert second.state.position.tolist() == [8, 8, 8]

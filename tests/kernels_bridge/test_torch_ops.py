"""Law 4, counted: readable steps only where an edit touches. And the torch backend against the readable model."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import tiny
from torch import Tensor

import minimal_mamba.scan
from interp import Add, Address, Edit, Mean, Scale, Set, Zero, at, gradients, logit_diff, run
from kernels_bridge import resolve, torch_ops
from kernels_bridge.torch_ops import stretches
from minimal_mamba import SITES, Mamba, MambaConfig, MambaOutput, MambaState, Plan

RECURRENCE = ("decay", "state_write", "ssm_state", "state_read")
MODEL = tiny()
LAYERS = MODEL.config.n_layer
RTOL = 1e-10  # relative norm in float64; measured below 1e-13


class Count:
    """How often a function was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str):
        self.n, inner = 0, getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.n += 1
            return inner(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[int, int]]:
    """(steps of the scan, steps of the conv) that the torch backend made since the last call."""
    scan, conv = Count(monkeypatch, torch_ops, "ssm_step"), Count(monkeypatch, torch_ops, "causal_conv")

    def take() -> tuple[int, int]:
        taken, scan.n, conv.n = (scan.n, conv.n), 0, 0
        return taken

    return take


def draw_ids(b: int, l: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 29, (b, l), generator=torch.Generator().manual_seed(seed))


# -- law 4 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("l", [32, 128])
def test_nothing_touched_takes_no_step(l: int, steps: Callable[[], tuple[int, int]]) -> None:
    ids = draw_ids(2, l)
    run(MODEL, ids, backend="torch", keep_state=True)
    assert steps() == (0, 0)
    run(MODEL, ids, backend="torch", record=[getattr(at, name)() for name in SITES])
    assert steps() == (0, 0)
    run(MODEL, ids, backend="torch", record=[at.recurrent_state(pos=[3, -1])], lengths=[l, 5])
    assert steps() == (0, 0)


@pytest.mark.parametrize("name", [name for name, site in SITES.items() if not site.per_position])
def test_an_edit_outside_the_recurrence_takes_no_step(name: str, steps: Callable[[], tuple[int, int]]) -> None:
    place = getattr(at, name)
    record = [at.ssm_state(), at.conv_state()]
    run(MODEL, draw_ids(2, 32), backend="torch", edits=[Scale(place(), 0.9), Zero(place(pos=[3, 7]))], record=record)
    assert steps() == (0, 0)


@pytest.mark.parametrize("l", [32, 128])
@pytest.mark.parametrize("name", [*RECURRENCE, "conv_state", "recurrent_state"])
def test_an_edit_in_it_takes_one_step_a_position(name: str, l: int, steps: Callable[[], tuple[int, int]]) -> None:
    """As many for 32 tokens as for 128."""
    place, ids = getattr(at, name), draw_ids(2, l)
    scan = name != "conv_state"
    conv = name in ("conv_state", "recurrent_state")
    for positions, layers in (([5], 1), ([3, 7], 1), ([3, 4, -1], 2), ([0], LAYERS)):
        address = place(layer=list(range(layers)), pos=positions)
        run(MODEL, ids, backend="torch", edits=[Scale(address, 0.5)], record=[at.ssm_state(), at.conv_state()])
        touched = len(positions) * layers
        assert steps() == (touched * scan, touched * conv), (positions, layers)


def test_edits_of_one_position_share_its_step(steps: Callable[[], tuple[int, int]]) -> None:
    edits = [Scale(getattr(at, name)(layer=1, pos=4), 0.5) for name in RECURRENCE]
    run(MODEL, draw_ids(2, 32), backend="torch", edits=[*edits, Zero(at.ssm_state(layer=1, pos=4))])
    assert steps() == (1, 0)
    ragged = [Zero(at.ssm_state(layer=0, pos=-1))]  # positions 31 and 9
    run(MODEL, draw_ids(2, 32), backend="torch", edits=ragged, lengths=[32, 10])
    assert steps() == (2, 0)


STATE = at.ssm_state(layer=1, pos=4)
PUT: dict[str, tuple[list[Edit], list[Address], int]] = {
    "whole": ([Set(STATE, 0.3)], [at.ssm_state(), at.state_read()], 0),
    "zero": ([Zero(STATE), Scale(at.state_read(layer=1, pos=4), 2.0)], [], 0),
    "row by row": ([Set(STATE, 0.3, rows=[1]), Zero(STATE, rows=[0])], [at.ssm_state()], 0),
    "and then changed": ([Set(STATE, 0.3), Scale(STATE, 0.5)], [], 0),
    "of one row": ([Set(STATE, 0.3, rows=[1])], [], 1),
    "of some dimensions": ([Set(at.ssm_state(layer=1, pos=4, n=[0, 2]), 0.3)], [], 1),
    "changed": ([Scale(STATE, 0.5)], [], 1),
    "beside what it would be": ([Set(STATE, 0.3)], [at.decay(layer=1, pos=4), at.state_write()], 1),
    "beside an edit of the write": ([Set(STATE, 0.3), Zero(at.state_write(layer=1, pos=4))], [], 1),
}


@pytest.mark.parametrize("name", PUT)
def test_a_state_that_is_put_in_place_of_any_takes_no_step(name: str, steps: Callable[[], tuple[int, int]]) -> None:
    edits, record, taken = PUT[name]
    value = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    edits = [Set(e.address, value, rows=e.rows) if isinstance(e, Set) else e for e in edits]
    found = {}
    for backend in ("torch", "reference"):
        done = run(MODEL, draw_ids(2, 9), edits, record, backend, keep_state=True)
        values = [done.logits, *done.state.ssm_state, *(done[a] for a in record)]
        leaves = [*MODEL.parameters(), *([value] if any(isinstance(e, Set) for e in edits) else [])]
        loss = sum(v.square().sum() for v in values)
        found[backend] = [*values, *torch.autograd.grad(loss, leaves)]
    assert steps() == (taken, 0)
    for got, want in zip(*found.values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("l", [32, 128])
def test_gradients_take_no_step(l: int, steps: Callable[[], tuple[int, int]]) -> None:
    wrt = [at.ssm_state(), at.state_write(), at.resid_pre(), at.dt(layer=1), at.B(), at.conv_state()]
    gradients(MODEL, draw_ids(2, l), logit_diff_of_the_end, wrt, backend="torch")
    assert steps() == (0, 0)
    beside = [Zero(at.conv_state(layer=1, pos=5)), Zero(at.ssm_state(layer=2, pos=5))]
    gradients(MODEL, draw_ids(2, l), logit_diff_of_the_end, wrt, beside, backend="torch")
    assert steps() == (1, 1)


def logit_diff_of_the_end(logits: Tensor) -> Tensor:
    return logit_diff(logits[:, -1], torch.tensor([3, 4]), torch.tensor([5, 6]))


def test_the_readable_model_steps_at_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the count sees steps."""
    count = Count(monkeypatch, minimal_mamba.scan, "ssm_step")
    for l in (5, 32):
        run(MODEL, draw_ids(2, l), backend="reference")
        assert count.n == l * LAYERS
        count.n = 0


@pytest.mark.parametrize("touched", [[], [0], [4], [0, 4], [2], [1, 2], [0, 1, 2, 3, 4]])
def test_stretches_cover_each_position_once(touched: list[int]) -> None:
    found = list(stretches(5, touched))
    assert [t for first, stop, _ in found for t in range(first, stop)] == list(range(5))
    assert [first for first, _, edited in found if edited] == touched
    for (_, _, one), (_, _, other) in pairwise(found):
        assert one or other  # two untouched stretches never meet


# -- against the readable model ---------------------------------------------------------------------------------------


def norm_near(got: Tensor, want: Tensor, what: str, rtol: float = RTOL) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype, what
    error = (got - want).norm() / want.norm().clamp(min=1e-9)
    assert error <= rtol, f"{what}: off by {error:.1e}"


def draw_state(model: Mamba, position: list[int]) -> MambaState:
    g, zero = torch.Generator().manual_seed(3), model.initial_state(len(position))

    def normal(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.randn(t.shape, generator=g, dtype=torch.float64).requires_grad_() for t in tensors)

    return MambaState(normal(zero.ssm_state), normal(zero.conv_state), torch.tensor(position))


def draw_value(*shape: int) -> Tensor:
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()


def no_edits(c: MambaConfig) -> list[Edit]:
    return []


def edits_everywhere(c: MambaConfig) -> list[Edit]:
    """First, last, adjacent and all positions; some rows only; all kinds of place; two on one place."""
    e, n, k = c.d_inner, c.d_state, c.d_conv
    return [
        Set(at.ssm_state(layer=0, pos=0), draw_value(3, e, n)),
        Set(at.ssm_state(layer=1, pos=[4, 5]), draw_value(3, 2, e, n)),
        Add(at.ssm_state(layer=1, pos=5, e=2), draw_value(n)),
        Scale(at.ssm_state(layer=2, pos=-1), 0.5),
        Add(at.state_read(layer=1, pos=[2, 5]), draw_value(1, 1, e, n)),
        Scale(at.decay(layer=0, pos=slice(3, 5)), 0.7),
        Zero(at.state_write(layer=2, pos=3), rows=[1]),
        Add(at.conv_state(layer=1, pos=3), draw_value(1, e, k)),
        Set(at.recurrent_state(layer=2, pos=4), draw_value(3, e, n + k)),
        Mean(at.conv_state(layer=0, pos=[0, 2])),
        Scale(at.recurrent_state(layer=1, pos=-1), 0.5),  # padding of other rows, where rows end apart
        Scale(at.u(layer=0, pos=2), 1.3),
        Add(at.dt(layer=1, pos=slice(1, 4)), 0.2),
        Add(at.resid_pre(layer=2), draw_value(c.d_model)),
    ]


CASES: dict[str, dict[str, Any]] = {
    "clean": {},
    "padded": {"lengths": [9, 6, 7]},
    "carried": {"position": [0, 0, 0]},
    "padded and carried": {"lengths": [9, 6, 7], "position": [0, 0, 0]},
    "edits": {"edits": edits_everywhere},
    "edits, padded": {"edits": edits_everywhere, "lengths": [9, 6, 7]},
    "edits, padded and carried": {"edits": edits_everywhere, "lengths": [9, 6, 7], "position": [0, 0, 0]},
}
SMALL: dict[str, dict[str, Any]] = {
    "tiny": {},
    "biases, d_conv 4": {"bias": True, "d_conv": 4, "conv_bias": False, "rms_norm": False, "tie_embeddings": False},
    "d_conv 1, d_state 1": {"d_conv": 1, "d_state": 1},
}


def measure(model: Mamba, backend: str, case: dict[str, Any], ids: Tensor) -> dict[str, Tensor]:
    """Logits, final states, the gradients of all parameters, of the carried state and of the edits' values."""
    lengths = case.get("lengths")
    state = draw_state(model, case["position"]) if "position" in case else None
    edits = case.get("edits", no_edits)(model.config)
    sizes = torch.tensor(lengths or [ids.shape[1]] * len(ids))
    start = state.position if state is not None else torch.zeros(len(ids), dtype=torch.long)
    plan = Plan(model.config, edits, (), start, start + sizes)
    out: MambaOutput = model(ids, state=state, lengths=lengths, keep_state=True, tap=plan, ops=resolve(backend))
    plan.results()
    assert out.state is not None
    found = {"logits": out.logits}
    for i, pair in enumerate(zip(out.state.ssm_state, out.state.conv_state, strict=True)):
        found[f"h {i}"], found[f"window {i}"] = pair
    sources = dict(model.named_parameters())
    values = {f"edit {i}": edit.value for i, edit in enumerate(edits)}
    sources |= {name: value for name, value in values.items() if value is not None and value.requires_grad}
    if state is not None:
        sources |= {f"h0 {i}": h for i, h in enumerate(state.ssm_state)}
        sources |= {f"window0 {i}": w for i, w in enumerate(state.conv_state)}
    g = torch.Generator().manual_seed(11)
    loss = sum((v * torch.randn(v.shape, generator=g, dtype=torch.float64)).sum() for v in found.values())
    grads = torch.autograd.grad(loss, list(sources.values()), materialize_grads=True)
    found |= {f"gradient of {name}": grad for name, grad in zip(sources, grads, strict=True)}
    return {name: value.detach() for name, value in found.items()}


@pytest.mark.parametrize("sizes", SMALL)
@pytest.mark.parametrize("name", CASES)
def test_torch_is_the_readable_model(name: str, sizes: str) -> None:
    case, model, ids = CASES[name], tiny(**SMALL[sizes]), draw_ids(3, 9)
    want, got = measure(model, "reference", case, ids), measure(model, "torch", case, ids)
    assert want.keys() == got.keys()
    for key, value in want.items():
        norm_near(got[key], value, key)
    dead = {key for key, value in want.items() if value.eq(0).all()}  # a comparison of zeros would see nothing
    assert not {key for key in dead if key.startswith(("logits", "h ", "gradient of backbone"))}, dead


@pytest.mark.parametrize("l", [1, 2, 7, 63, 500])
def test_torch_is_the_readable_model_at_every_length(l: int) -> None:
    model, ids = tiny(n_layer=2), draw_ids(2, l)
    want, got = (measure(model, backend, {}, ids) for backend in ("reference", "torch"))
    for key, value in want.items():
        norm_near(got[key], value, key)


@torch.no_grad()
def test_torch_in_pieces_is_one_pass() -> None:
    ids, ops = draw_ids(2, 63), resolve("torch")
    whole, state, logits = MODEL(ids, keep_state=True, ops=ops), None, []
    for first, stop in ((0, 1), (1, 3), (3, 10), (10, 11), (11, 63)):
        out = MODEL(ids[:, first:stop], state=state, keep_state=True, ops=ops)
        logits, state = [*logits, out.logits], out.state
    norm_near(torch.cat(logits, 1), whole.logits, "logits")
    assert state is not None and whole.state is not None
    for a, b in zip(state.ssm_state + state.conv_state, whole.state.ssm_state + whole.state.conv_state, strict=True):
        norm_near(a, b, "state")


@torch.no_grad()
def test_torch_leaves_the_carried_state_as_it_is() -> None:
    state = draw_state(MODEL, [0, 0])
    kept = [t.detach().clone() for t in (*state.ssm_state, *state.conv_state)]
    for lengths in (None, [4, 1]):
        out = MODEL(draw_ids(2, 4), state=state, lengths=lengths, keep_state=True, ops=resolve("torch"))
        for t in (*out.state.ssm_state, *out.state.conv_state):
            t.add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip(kept, (*state.ssm_state, *state.conv_state), strict=True))


@torch.no_grad()
def test_pad_tokens_change_nothing_to_the_bit() -> None:
    ids, sizes = draw_ids(4, 9), [9, 1, 4, 2]
    real = torch.arange(9) < torch.tensor(sizes)[:, None]
    edits, record = [Scale(at.ssm_state(layer=1, pos=-1), 0.5)], [at.ssm_state(), at.conv_state(), at.y()]
    a, b = (
        run(MODEL, x, edits=edits, record=record, backend="torch", keep_state=True, lengths=sizes)
        for x in (ids, torch.where(real, ids, (ids + 7) % 29))
    )
    assert torch.equal(a.logits, b.logits) and all(torch.equal(a[r].nan_to_num(), b[r].nan_to_num()) for r in record)
    for x, y in zip(a.state.ssm_state + a.state.conv_state, b.state.ssm_state + b.state.conv_state, strict=True):
        assert torch.equal(x, y)


# dtype: how far torch may be from the readable model of the same type, beside the readable model's own error
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_torch_errs_no_more_than_twice_the_readable_model(dtype: torch.dtype) -> None:
    ids = draw_ids(2, 129)
    exact, model = MODEL(ids).logits, tiny(dtype=dtype)

    def off(backend: str) -> float:
        out = model(ids, ops=resolve(backend), keep_state=True)
        assert out.logits.dtype == dtype and out.state.ssm_state[0].dtype == torch.float32
        return ((out.logits.double() - exact).norm() / exact.norm()).item()

    assert off("torch") <= 2 * off("reference") + 1e-7


@pytest.mark.parametrize("backend", ["torch", "compiled"])
@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2], [0, 2, 1], [2, 3, 1], [3, 1, 0]])
@torch.no_grad()
def test_a_mean_between_overwrites_of_some_rows(backend: str, order: list[int]) -> None:
    """What is put there needs what was there, although every row is overwritten by one edit or another."""
    ids = torch.randint(0, 29, (3, 7), generator=torch.Generator().manual_seed(0))
    h = at.ssm_state(layer=1, pos=3)
    kinds = [Zero(h, rows=[1]), Mean(h), Set(h, 1.0, rows=[0, 2]), Mean(h, rows=[0, 2])]
    edits, record = [kinds[i] for i in order], [h, at.y(layer=1)]
    want, found = (run(MODEL, ids, edits, record, backend=name) for name in ("reference", backend))
    for a, b in zip((want.logits, *want.records.values()), (found.logits, *found.records.values()), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)

"""The model: pieces and padding change nothing, the carried state is a value, types."""

from typing import Any

import pytest
import torch
from helpers import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interp import at, run
from minimal_mamba import SITES, Mamba, MambaOutput, MambaState

ATOL = 1e-11  # float64 rounding where states reach 100; measured below 1e-12
MODEL = tiny()
LENGTHS = (1, MODEL.config.d_conv - 1, 7, 63)


def draw_ids(b: int, l: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 29, (b, l), generator=torch.Generator().manual_seed(seed))


def draw_state(model: Mamba, b: int, seed: int = 1) -> MambaState:
    g, zero = torch.Generator().manual_seed(seed), model.initial_state(b)

    def normal(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in tensors)

    return MambaState(normal(zero.ssm_state), normal(zero.conv_state), torch.arange(b) + 3)


def in_pieces(model: Mamba, ids: Tensor, cuts: list[int], state: MambaState | None = None) -> tuple[Tensor, MambaState]:
    logits = []
    for first, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        out = model(ids[:, first:stop], state=state, keep_state=True)
        logits.append(out.logits)
        state = out.state
    assert state is not None
    return torch.cat(logits, 1), state


def states_of(state: MambaState | None) -> list[Tensor]:
    assert state is not None
    return [*state.ssm_state, *state.conv_state]


def assert_close(got: Tensor, want: Tensor, atol: float = ATOL) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


# -- pieces -----------------------------------------------------------------------------------------------------------


@st.composite
def splits(draw: st.DrawFn) -> tuple[int, list[int], bool]:
    l = draw(st.sampled_from(LENGTHS))
    cuts = draw(st.sets(st.integers(1, l - 1), max_size=6)) if l > 1 else set()
    return l, sorted(cuts), draw(st.booleans())


WHOLE: dict[tuple[int, bool], MambaOutput] = {}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(splits())
@torch.no_grad()
def test_any_split_is_one_pass(split: tuple[int, list[int], bool]) -> None:
    l, cuts, carried = split
    ids, state = draw_ids(2, l), draw_state(MODEL, 2) if carried else None
    if (l, carried) not in WHOLE:
        WHOLE[l, carried] = MODEL(ids, state=state, keep_state=True)
    whole = WHOLE[l, carried]
    logits, after = in_pieces(MODEL, ids, cuts, state)
    assert_close(logits, whole.logits)
    for got, want in zip(states_of(after), states_of(whole.state), strict=True):
        assert_close(got, want)
    assert whole.state is not None
    assert after.position.tolist() == whole.state.position.tolist() == ([3 + l, 4 + l] if carried else [l, l])


@pytest.mark.parametrize("l", LENGTHS)
@pytest.mark.parametrize("d_conv", [1, 2, 4])
@torch.no_grad()
def test_token_by_token_is_one_pass(l: int, d_conv: int) -> None:
    model, ids = tiny(d_conv=d_conv, n_layer=2), draw_ids(2, l)
    whole = model(ids, keep_state=True)
    logits, after = in_pieces(model, ids, list(range(1, l)))
    assert_close(logits, whole.logits)
    for got, want in zip(states_of(after), states_of(whole.state), strict=True):
        assert_close(got, want)


@torch.no_grad()
def test_dropping_either_half_of_the_state_shows() -> None:
    """Control for the two tests above: neither the scan's nor the conv's memory is too weak to be missed."""
    ids = draw_ids(2, 7)
    whole, before = MODEL(ids).logits[:, 4:], MODEL(ids[:, :4], keep_state=True).state
    fresh = MODEL.initial_state(2)
    for state in (
        MambaState(fresh.ssm_state, before.conv_state, before.position),
        MambaState(before.ssm_state, fresh.conv_state, before.position),
    ):
        assert (MODEL(ids[:, 4:], state=state).logits - whole).abs().max() > 1e-2


# -- padding ----------------------------------------------------------------------------------------------------------

ROWS = [7, 1, 2, 5, 7, 3]


@pytest.mark.parametrize("carried", [False, True])
@torch.no_grad()
def test_a_padded_row_gives_what_it_gives_alone(carried: bool) -> None:
    ids, state = draw_ids(len(ROWS), 7), draw_state(MODEL, len(ROWS)) if carried else None
    record = [getattr(at, name)() for name in SITES]
    batch = run(MODEL, ids, record=record, backend="reference", state=state, keep_state=True, lengths=ROWS)
    for i, size in enumerate(ROWS):
        own = None
        if state is not None:
            parts = (tuple(s[i : i + 1] for s in tensors) for tensors in (state.ssm_state, state.conv_state))
            own = MambaState(*parts, state.position[i : i + 1])
        alone = run(MODEL, ids[i : i + 1, :size], record=record, backend="reference", state=own, keep_state=True)
        assert_close(batch.logits[i, :size], alone.logits[0])
        assert_close(batch.last_logits[i], alone.last_logits[0])
        for got, want in zip(states_of(batch.state), states_of(alone.state), strict=True):
            assert_close(got[i], want[0])
        for address in record:
            axis = 1 if address.layer is not None else 0
            assert_close(batch[address].select(axis, i).narrow(axis, 0, size), alone[address].select(axis, 0))
        assert batch.state.position[i] == alone.state.position[0]
    assert batch.logits[1, 1:].eq(0).all() and batch.logits[2, 2:].eq(0).all()
    assert batch.logits[1, 0].ne(0).all()


@torch.no_grad()
def test_pad_tokens_change_nothing_to_the_bit() -> None:
    ids = draw_ids(len(ROWS), 7)
    other = (ids + 11) % 29
    real = torch.arange(7) < torch.tensor(ROWS)[:, None]
    record = [getattr(at, name)() for name in SITES]
    runs = [
        run(MODEL, x, record=record, backend="reference", keep_state=True, lengths=ROWS)
        for x in (ids, torch.where(real, ids, other))
    ]
    assert torch.equal(runs[0].logits, runs[1].logits)
    for a, b in zip(states_of(runs[0].state), states_of(runs[1].state), strict=True):
        assert torch.equal(a, b)
    for address in record:
        torch.testing.assert_close(runs[0][address], runs[1][address], rtol=0, atol=0, equal_nan=True)
    # control: without lengths the same tokens are no padding, and the state shows them
    ends = [MODEL(x, keep_state=True).state.ssm_state[0] for x in (ids, torch.where(real, ids, other))]
    assert not torch.allclose(*ends, atol=1e-2)


@torch.no_grad()
def test_lengths_come_as_a_tensor_or_a_list() -> None:
    ids = draw_ids(2, 5)
    want = MODEL(ids, lengths=[5, 2]).logits
    assert torch.equal(MODEL(ids, lengths=torch.tensor([5, 2])).logits, want)
    assert torch.equal(MODEL(ids, lengths=torch.tensor([5, 2], dtype=torch.int32)).logits, want)
    assert torch.equal(MODEL(ids, lengths=[5, 5]).logits, MODEL(ids).logits)


# -- the carried state, last_only -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, [4, 1]])
def test_a_forward_never_changes_the_state_it_is_given(lengths: list[int] | None) -> None:
    state, ids = draw_state(MODEL, 2), draw_ids(2, 4)
    before = [t.clone() for t in (*states_of(state), state.position)]
    first = MODEL(ids, state=state, keep_state=True, lengths=lengths)
    assert all(torch.equal(a, b) for a, b in zip(before, (*states_of(state), state.position), strict=True))
    again = MODEL(ids, state=state, keep_state=True, lengths=lengths)
    assert torch.equal(first.logits, again.logits)
    after = [t.detach().clone() for t in states_of(first.state)]
    MODEL(ids, state=first.state, keep_state=True)
    assert all(torch.equal(a, b) for a, b in zip(after, states_of(first.state), strict=True))


@torch.no_grad()
def test_a_returned_state_shares_no_memory_with_the_one_given() -> None:
    """Not even where padding or a lone token leaves much of it as it was."""
    state, ids = draw_state(MODEL, 2), draw_ids(2, 1)
    kept = [t.clone() for t in states_of(state)]
    for t in states_of(MODEL(ids, state=state, keep_state=True).state):
        t.add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip(kept, states_of(state), strict=True))


@torch.no_grad()
def test_the_layers_of_a_fresh_state_share_no_memory() -> None:
    fresh = MODEL.initial_state(2)
    fresh.ssm_state[0].add_(1.0), fresh.conv_state[0].add_(1.0)
    assert not any(t.any() for t in (*fresh.ssm_state[1:], *fresh.conv_state[1:]))
    again = MODEL(draw_ids(2, 3), keep_state=True)
    assert torch.equal(again.logits, MODEL(draw_ids(2, 3), state=MODEL.initial_state(2)).logits)


def test_states_and_outputs_compare_and_hash_by_identity() -> None:
    a, b = (MODEL(draw_ids(1, 3), keep_state=True) for _ in range(2))
    assert a == a and a != b and a.state == a.state and a.state != b.state
    assert len({a, b, a.state, b.state}) == 4


@torch.no_grad()
def test_the_state_is_kept_only_when_asked() -> None:
    assert MODEL(draw_ids(1, 3)).state is None
    fresh = MODEL.initial_state(2)
    assert all(t.eq(0).all() for t in states_of(fresh)) and fresh.position.tolist() == [0, 0]
    ids = draw_ids(2, 3)
    assert torch.equal(MODEL(ids, state=fresh).logits, MODEL(ids).logits)


def test_the_gradient_flows_into_and_out_of_a_carried_state() -> None:
    """Two pieces trained as one: the gradient of the first piece's weights through the state is the whole pass's."""
    ids = draw_ids(2, 7)
    weight = torch.randn(2, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    params = [p for _, p in MODEL.named_parameters()]
    whole = torch.autograd.grad((MODEL(ids).logits[:, 4:] * weight).sum(), params)
    state = MODEL(ids[:, :4], keep_state=True).state
    halves = torch.autograd.grad((MODEL(ids[:, 4:], state=state).logits * weight).sum(), params)
    for a, b in zip(halves, whole, strict=True):
        assert_close(a, b, 1e-10)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("lengths", [None, [5, 2, 1]])
@torch.no_grad()
def test_last_only_is_the_last_row_of_all(lengths: list[int] | None, recorded: bool) -> None:
    ids = draw_ids(3, 5)
    full = MODEL(ids, lengths=lengths, keep_state=True)
    ends = torch.tensor(lengths or [5, 5, 5]) - 1
    address = at.logits()
    how: dict[str, Any] = {"backend": "reference", "lengths": lengths, "last_only": True, "keep_state": True}
    got = run(MODEL, ids, record=[address] if recorded else [], **how)
    assert got.logits.shape == (3, 1, 32)
    assert_close(got.logits[:, 0], full.logits[torch.arange(3), ends])
    assert_close(got.last_logits, full.logits[torch.arange(3), ends])
    for a, b in zip(states_of(got.state), states_of(full.state), strict=True):
        assert torch.equal(a, b)
    if recorded:  # recording all logits under last_only gives all, not the last
        assert_close(got[address].nan_to_num(), full.logits)  # what a row has no position for is recorded as NaN


# -- types ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_bfloat16_model_keeps_a_float32_state() -> None:
    """However a pass is cut, the state is the same; one rounded to 16 bits between the pieces drifts away."""
    model, ids = tiny(dtype=torch.bfloat16), draw_ids(2, 63)
    whole = model(ids, keep_state=True)
    logits, after = in_pieces(model, ids, list(range(1, 63)))
    assert whole.logits.dtype == torch.bfloat16
    for state in (whole.state, after):
        assert {h.dtype for h in state.ssm_state} == {torch.float32}
        assert {w.dtype for w in state.conv_state} == {torch.bfloat16}
    sites = [getattr(at, name)() for name in ("ssm_state", "resid_post", "dt", "decay", "ssm_out")]
    got = run(model, ids, record=sites, backend="reference")
    assert {got[a].dtype for a in sites} == {torch.float32}

    rounded, drifted = None, []
    for t in range(63):
        out = model(ids[:, t : t + 1], state=rounded, keep_state=True)
        h = tuple(s.bfloat16().float() for s in out.state.ssm_state)
        rounded = MambaState(h, out.state.conv_state, out.state.position)
        drifted.append(out.logits)

    def off(other: Tensor, ours: Tensor) -> float:
        return ((other.float() - ours.float()).norm() / ours.float().norm()).item()

    # measured: no difference at all, against 1e-3 and more
    for ours, cut, bad in zip(whole.state.ssm_state, after.ssm_state, rounded.ssm_state, strict=True):
        assert off(cut, ours) < off(bad, ours) / 4
    assert off(logits, whole.logits) < off(torch.cat(drifted, 1), whole.logits) / 4
    exact = tiny()(ids).logits
    assert off(whole.logits, exact) < 0.1  # measured 0.035


@torch.no_grad()
def test_a_float32_model_is_near_the_float64_one() -> None:
    ids = draw_ids(2, 63)
    single, double = tiny(dtype=torch.float32)(ids, keep_state=True), tiny()(ids)
    assert single.logits.dtype == torch.float32 and single.state.ssm_state[0].dtype == torch.float32
    assert (single.logits - double.logits).norm() / double.logits.norm() < 1e-5

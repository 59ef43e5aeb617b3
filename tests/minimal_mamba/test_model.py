"""The model: pieces and padding change nothing, the carried state is a value, initialisation, bad inputs."""

import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interp import at, run
from minimal_mamba import SITES, Mamba, MambaConfig, MambaOutput, MambascopeError, MambaState
from minimal_mamba.errors import ConfigError, InputError

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


# -- initialisation ---------------------------------------------------------------------------------------------------


def test_initialisation_is_mamba_ssms() -> None:
    torch.manual_seed(0)
    config = MambaConfig(d_model=64, n_layer=4, vocab_size=1000, d_state=6, bias=True, dt_min=0.002, dt_max=0.05)
    model = Mamba(config)
    embedding = model.backbone.embedding.weight
    assert abs(embedding.std().item() - 0.02) < 0.0005 and abs(embedding.mean().item()) < 0.0005
    assert model.lm_head.weight is embedding
    biases = []
    for layer in model.backbone.layers:
        m = layer.mixer
        assert_close(m.A_log.exp(), torch.arange(1.0, 7.0).expand(128, 6), 1e-5)
        assert m.D.eq(1).all() and m.in_proj.bias.eq(0).all() and m.out_proj.bias.eq(0).all()
        assert layer.norm.weight.eq(1).all()
        biases.append(torch.log1p(m.dt_proj.bias.exp()))  # softplus
        bound = config.rank**-0.5
        assert bound * 0.95 < m.dt_proj.weight.abs().max() <= bound  # uniform up to the bound
        fan_in = 1 / math.sqrt(config.d_inner)  # of nn.Linear's uniform draw, then / sqrt(n_layer)
        assert fan_in / 2 * 0.98 < m.out_proj.weight.abs().max() <= fan_in / 2
        assert m.in_proj.weight.abs().max() > 0.98 / math.sqrt(64)  # not scaled
    dt = torch.cat(biases)
    assert dt.min() >= 0.002 * (1 - 1e-4) and dt.max() <= 0.05 * (1 + 1e-4)
    share = (dt.log().sort().values - math.log(0.002)) / math.log(25)  # uniform in the logarithm
    assert (share - torch.linspace(0, 1, len(dt))).abs().max() < 0.08
    untied = Mamba(MambaConfig(d_model=8, n_layer=1, vocab_size=8, tie_embeddings=False))
    assert not torch.equal(untied.lm_head.weight, untied.backbone.embedding.weight)


def test_choices_of_initialisation() -> None:
    def mixer(**fields: Any) -> torch.nn.Module:
        torch.manual_seed(0)
        return Mamba(MambaConfig(d_model=32, n_layer=4, vocab_size=8, **fields)).backbone.layers[0].mixer

    constant = mixer(dt_init="constant", dt_scale=0.5, dt_rank=4).dt_proj.weight
    assert constant.eq(0.25).all()
    plain, scaled = mixer(rescale_prenorm_residual=False), mixer()
    assert_close(plain.out_proj.weight, scaled.out_proj.weight * 2, 1e-7)
    floored = torch.log1p(mixer(dt_min=1e-6, dt_max=1e-5, dt_init_floor=1e-3).dt_proj.bias.exp())
    assert_close(floored, torch.full_like(floored, 1e-3), 1e-6)


@pytest.mark.parametrize(
    ("vocab", "multiple", "rows"), [(29, 8, 32), (32, 8, 32), (33, 8, 40), (29, 1, 29), (50277, 8, 50280)]
)
def test_sizes_that_follow_from_others(vocab: int, multiple: int, rows: int) -> None:
    c = MambaConfig(d_model=40, n_layer=1, vocab_size=vocab, pad_vocab_size_multiple=multiple, expand=1.5)
    assert (c.padded_vocab, c.rank, c.d_inner) == (rows, 3, 60)


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


# -- what is refused --------------------------------------------------------------------------------------------------

IDS = draw_ids(2, 4)


def state_with(**changed: Any) -> MambaState:
    return MambaState(**{**vars(MODEL.initial_state(2)), **changed})


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "one axis": (lambda: MODEL(torch.tensor([1, 2, 3])), r"ids has shape \(3,\); it is \(batch, length\)"),
    "three axes": (lambda: MODEL(IDS[None]), r"ids has shape \(1, 2, 4\)"),
    "no row": (lambda: MODEL(IDS[:0]), r"ids has shape \(0, 4\).*at least one token"),
    "no token": (lambda: MODEL(IDS[:, :0]), r"ids has shape \(2, 0\).*at least one token"),
    "float ids": (lambda: MODEL(IDS.double()), r"ids has type torch.float64; token ids are integers"),
    "bool ids": (lambda: MODEL(IDS > 3), r"ids has type torch.bool"),
    "negative id": (lambda: MODEL(torch.tensor([[3, -1]])), r"token id -1 is outside the vocabulary 0\.\.28\.$"),
    "padding row": (lambda: MODEL(torch.tensor([[3, 29]])), r"token id 29 is .* \(rows up to 31 are padding\)"),
    "beyond all rows": (lambda: MODEL(torch.tensor([[3, 32]])), r"token id 32 is outside the vocabulary 0\.\.28\.$"),
    "bad id on padding": (lambda: MODEL(torch.tensor([[3, 99]]), lengths=[1]), r"token id 99 is outside"),
    "length 0": (lambda: MODEL(IDS, lengths=[4, 0]), r"lengths=\[4, 0\]: give one int of 1\.\.4 a row, for 2 rows"),
    "length too long": (lambda: MODEL(IDS, lengths=[5, 4]), r"lengths=\[5, 4\]: give one int of 1\.\.4"),
    "one length for two rows": (lambda: MODEL(IDS, lengths=[4]), r"lengths=\[4\].*for 2 rows"),
    "lengths of two axes": (lambda: MODEL(IDS, lengths=[[4, 4]]), r"lengths=\[\[4, 4\]\]"),
    "ragged ids": (lambda: MODEL([[1, 2], [3]]), r"ids is no rectangular array of integers"),
    "text": (lambda: MODEL("1 2"), r"ids is no rectangular array of integers"),
    "complex ids": (lambda: MODEL(IDS.to(torch.complex64)), r"ids has type torch.complex64; token ids are integers"),
    "bool lengths": (lambda: MODEL(IDS, lengths=[True, True]), r"lengths=\[True, True\] has type torch.bool"),
    "float lengths": (
        lambda: MODEL(IDS, lengths=[4.0, 3.0]),
        r"lengths=\[4\.0, 3\.0\] has type torch.float32; give one int",
    ),
    "state of another batch": (
        lambda: MODEL(IDS, state=MODEL.initial_state(3)),
        r"state.ssm_state has shapes \[\(3, 24, 5\).*this run has \(2, 24, 5\) in 3",
    ),
    "state of fewer layers": (
        lambda: MODEL(IDS, state=tiny(n_layer=2).initial_state(2)),
        r"state.ssm_state .* in 2 layers; this run has \(2, 24, 5\) in 3",
    ),
    "state of another conv": (
        lambda: MODEL(IDS, state=state_with(conv_state=(torch.zeros(2, 24, 4),) * 3)),
        r"state.conv_state has shapes \[\(2, 24, 4\).*this run has \(2, 24, 3\)",
    ),
}


MODEL32, MODEL16 = tiny(dtype=torch.float32), tiny(dtype=torch.bfloat16)
BAD |= {
    "state of another type": (
        lambda: MODEL(IDS, state=MODEL32.initial_state(2)),
        r"state.ssm_state of layer 0 is torch.float32 on cpu; this model carries torch.float64 on cpu",
    ),
    "state in 16 bits": (
        lambda: MODEL16(
            IDS, state=replace(MODEL16.initial_state(2), ssm_state=(torch.zeros(2, 24, 5).bfloat16(),) * 3)
        ),
        r"state.ssm_state of layer 0 is torch.bfloat16 on cpu; this model carries torch.float32 on cpu",
    ),
    "conv state of another type": (
        lambda: MODEL16(IDS, state=replace(MODEL16.initial_state(2), conv_state=(torch.zeros(2, 24, 3),) * 3)),
        r"state.conv_state of layer 0 is torch.float32 on cpu; this model carries torch.bfloat16",
    ),
    "state elsewhere": (
        lambda: MODEL(IDS, state=state_with(ssm_state=(torch.zeros(2, 24, 5).double().to("meta"),) * 3)),
        r"state.ssm_state of layer 0 is torch.float64 on meta; this model carries torch.float64 on cpu",
    ),
    "float position": (
        lambda: MODEL(IDS, state=state_with(position=torch.zeros(2))),
        r"state.position has type torch.float32; positions are integers",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_input_that_cannot_run_is_refused(name: str) -> None:
    call, text = BAD[name]
    with pytest.raises(InputError, match=text) as caught:
        call()
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, MambascopeError)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@torch.no_grad()
def test_ids_of_every_integer_type_run(dtype: torch.dtype) -> None:
    assert torch.equal(MODEL(IDS.to(dtype)).logits, MODEL(IDS).logits)


def test_a_position_of_another_batch_is_refused() -> None:
    with pytest.raises(InputError, match="position"):
        MODEL(IDS, state=state_with(position=torch.zeros(3, dtype=torch.long)))


SIZES = ("d_model", "n_layer", "vocab_size", "d_state", "d_conv", "pad_vocab_size_multiple", "dt_rank")


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -3, 2.0, True, "8", (4,)])
def test_a_size_that_is_no_positive_int_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{name}=.*a size is an int of at least 1") as caught:
        MambaConfig(**{"d_model": 8, "n_layer": 1, "vocab_size": 8, name: value})
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, MambascopeError)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"expand": 0}, "expand=0 with d_model=8 leaves no inner channel"),
        ({"expand": -1}, "expand=-1"),
        ({"expand": 0.1}, "expand=0.1 with d_model=8 leaves no inner channel"),
        ({"expand": "2"}, "expand='2': give a finite number"),
        ({"expand": math.nan}, "expand=nan: give a finite number"),
        ({"expand": math.inf}, "expand=inf: give a finite number"),
        ({"expand": True}, "expand=True: give a finite number"),
        ({"dt_min": 0.0}, r"dt_min=0.0, dt_max=0.1: step sizes have 0 < dt_min <= dt_max"),
        ({"dt_min": -1.0}, r"dt_min=-1.0"),
        ({"dt_min": 0.2}, r"dt_min=0.2, dt_max=0.1"),
        ({"dt_max": "0.1"}, r"dt_max='0.1': give a finite number"),
        ({"norm_eps": 0.0}, r"norm_eps=0.0: an epsilon is above 0"),
        ({"norm_eps": -1e-5}, r"norm_eps=-1e-05: an epsilon is above 0"),
        ({"norm_eps": "1e-5"}, r"norm_eps='1e-5': give a finite number"),
        ({"norm_eps": None}, r"norm_eps=None: give a finite number"),
        ({"dt_init_floor": -1.0}, r"dt_init_floor=-1.0: 0 or more"),
        ({"initializer_range": -1}, r"initializer_range=-1: 0 or more"),
        ({"bias": 1}, "bias=1: a flag is True or False"),
        ({"rms_norm": "false"}, "rms_norm='false': a flag is True or False"),
        ({"tie_embeddings": None}, "tie_embeddings=None: a flag is True or False"),
        ({"dt_init": "zeros"}, "dt_init='zeros' is unknown; 'random' and 'constant' are"),
    ],
)
def test_choices_that_do_not_exist_are_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        MambaConfig(**{"d_model": 8, "n_layer": 1, "vocab_size": 8} | fields)


def test_a_type_by_its_name_is_refused(tmp_path: Path) -> None:
    MODEL32.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"dtype='float32' is no torch.dtype; pass one, such as torch.float32"):
        Mamba.from_pretrained(tmp_path, dtype="float32")  # type: ignore[arg-type]


def test_a_config_goes_through_pickle() -> None:
    config = MambaConfig(d_model=8, n_layer=1, vocab_size=8, expand=1.5, tie_embeddings=False)
    assert pickle.loads(pickle.dumps(config)) == config

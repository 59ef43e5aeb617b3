"""The single step against the readable model in float64; where it runs and where it must not; the norm of a sum."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import tiny
from torch import Tensor

from interp import Add, Apply, Scale, Set, Zero, at, generate, run
from interp.metrics import logit_diff
from kernels_bridge import resolve, torch_ops
from kernels_bridge.backends import BACKENDS
from minimal_mamba import SITES, Mamba, Plan, Tap
from minimal_mamba.block import INSIDE, RMSNorm
from minimal_mamba.errors import InputError
from minimal_mamba.scan import READABLE, Ops, causal_conv
from minimal_mamba.sites import ADDRESSABLE

HERE = [name for name in ("torch", "compiled") if not BACKENDS[name].missing(torch.device("cpu"))]
FAST = pytest.mark.parametrize("backend", HERE)
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "n 16, k 4, biases": {"d_state": 16, "d_conv": 4, "bias": True, "conv_bias": False},
    "FalconMamba": {"mixer_rms_eps": 0.3},
    "LayerNorm, k 1, n 1": {"rms_norm": False, "d_conv": 1, "d_state": 1, "tie_embeddings": False},
}
MODEL = tiny()
LAYERS = MODEL.config.n_layer


def draw_ids(b: int, l: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 29, (b, l), generator=torch.Generator().manual_seed(seed))


def near(got: Tensor, want: Tensor, rtol: float = 1e-12) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype and torch.isfinite(got).all()
    assert (got - want).norm() <= rtol * want.norm().clamp(min=1e-9), f"off by {(got - want).norm() / want.norm():.1e}"


def token_by_token(model: Mamba, ids: Tensor, ops: Ops, **more: Any) -> list[Tensor]:
    """Logits (b, l, v) and the last memory, one token a call."""
    state, logits = None, []
    with torch.no_grad():
        for t in range(ids.shape[1]):
            out = model(ids[:, t : t + 1], state=state, keep_state=True, ops=ops, **more)
            state, logits = out.state, [*logits, out.logits]
    assert state is not None
    return [torch.cat(logits, 1), *state.ssm_state, *state.conv_state]


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ran of each mixer on a token alone: "step" or "lines" (of the `torch` backend)."""
    found: list[str] = []

    def step(mixer: Any) -> Any:
        inner = torch_ops.step(mixer)

        def counted(*args: Any) -> Any:
            found.append("step")
            return inner(*args)

        return counted

    def conv(*args: Any, **kwargs: Any) -> Any:
        found.append("lines")
        return torch_ops.conv(*args, **kwargs)

    ops = replace(torch_ops.TORCH, step=step, conv=conv)
    monkeypatch.setitem(BACKENDS, "torch", replace(BACKENDS["torch"], ops=ops))
    return found


# -- the numbers ------------------------------------------------------------------------------------------------------


@FAST
@pytest.mark.parametrize("sizes", MODELS)
@pytest.mark.parametrize("b", [1, 2, 4, 7])
def test_a_step_is_the_readable_mixer(sizes: str, b: int, backend: str) -> None:
    """Rows in fours and the rest; from a memory of zeros to one of the model's own."""
    model, ids = tiny(**MODELS[sizes]), draw_ids(b, 9)
    for got, want in zip(*(token_by_token(model, ids, ops) for ops in (resolve(backend), READABLE)), strict=True):
        near(got, want)


@FAST
@pytest.mark.parametrize("sizes", ["tiny", "FalconMamba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_errs_no_more_than_twice_the_readable_one(dtype: torch.dtype, sizes: str, backend: str) -> None:
    ids, model = draw_ids(3, 70), tiny(dtype=dtype, **MODELS[sizes])
    exact = token_by_token(tiny(**MODELS[sizes]), ids, READABLE)

    def off(ops: Ops) -> list[float]:
        found = token_by_token(model, ids, ops)
        assert found[0].dtype == found[-1].dtype == dtype and found[1].dtype == torch.float32
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]

    for got, readable in zip(off(resolve(backend)), off(READABLE), strict=True):
        assert got <= 2 * readable + 1e-7


@FAST
@pytest.mark.parametrize("name", ["A_log", "D"])
def test_a_parameter_that_may_be_of_another_type(name: str, backend: str) -> None:
    """As checkpoints hold them; the readable model takes each to float32 or wider."""
    model, ids = tiny(), draw_ids(2, 5)
    for layer in model.backbone.layers:
        setattr(layer.mixer, name, torch.nn.Parameter(getattr(layer.mixer, name).detach().bfloat16()))
    for got, want in zip(*(token_by_token(model, ids, ops) for ops in (resolve(backend), READABLE)), strict=True):
        near(got, want)


@FAST
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["x", "h", "window", "dt"])
def test_what_is_not_a_number_goes_where_it_goes_line_by_line(place: str, value: float, backend: str) -> None:
    mixer, g = tiny().backbone.layers[0].mixer, torch.Generator().manual_seed(0)
    x, h, window = (
        torch.randn(size, generator=g, dtype=torch.float64) for size in ((2, 1, 12), (2, 24, 5), (2, 24, 3))
    )
    with torch.no_grad():
        if place == "dt":
            mixer.dt_proj.bias[3] = value
        else:
            {"x": x, "h": h, "window": window}[place][1, 0, 2] = value
        found = []
        for ops in (resolve(backend), READABLE):
            out, memory = mixer(x, (h, window), None, Tap(), ops)
            found.append([out, *memory])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-12, atol=1e-12)


@FAST
def test_what_it_is_given_is_left_as_it_is(backend: str) -> None:
    """And may need a gradient, be strided, or be the result of another step."""
    ids, ops = draw_ids(2, 1), resolve(backend)
    with torch.no_grad():
        state = MODEL(draw_ids(2, 5), keep_state=True).state
    odd = replace(
        state,
        ssm_state=tuple(h.mT.contiguous().mT.requires_grad_() for h in state.ssm_state),
        conv_state=tuple(w.mT.contiguous().mT.requires_grad_() for w in state.conv_state),
    )
    kept = [t.detach().clone() for t in (*state.ssm_state, *state.conv_state)]
    with torch.no_grad():
        one, two = (MODEL(ids, state=s, keep_state=True, ops=ops) for s in (state, odd))
        near(one.logits, two.logits, 0.0)
        for t in (*one.state.ssm_state, *one.state.conv_state):
            t.add_(1.0)
    for now, before in zip((*state.ssm_state, *state.conv_state, *odd.ssm_state, *odd.conv_state), 2 * kept,
                           strict=True):  # fmt: skip
        assert torch.equal(now, before)


@FAST
def test_new_weights_are_seen(backend: str) -> None:
    """What is laid out once serves one generation; nothing outlives it."""
    model, ids = tiny(), draw_ids(1, 4)
    before = generate(model, ids, 5, backend=backend)
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.mixer.A_log.add_(0.7)
            layer.mixer.in_proj.weight.mul_(1.2)
    after = generate(model, ids, 5, backend=backend)
    assert (after.logits - before.logits).norm() > 0.01 * before.logits.norm()
    near(after.logits, run(model, after.ids[:, :-1], backend="reference").logits.detach(), 1e-11)


@pytest.mark.skipif("compiled" not in HERE, reason="needs numba")
def test_rows_on_several_threads(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels_bridge.compiled import loop

    monkeypatch.setattr(loop, "FEW", 0)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(token_by_token(MODEL, draw_ids(7, 3), resolve("compiled")))
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):  # rows change company, and so the order of a sum
            near(got, want, 1e-14)


# -- where it runs ----------------------------------------------------------------------------------------------------


def test_it_runs_where_a_token_is_alone_and_no_gradient_is_wanted(stepped: list[str]) -> None:
    ids, ops = draw_ids(2, 3), resolve("torch")
    with torch.no_grad():
        state = MODEL(ids, keep_state=True, ops=ops).state
        assert stepped == ["lines"] * LAYERS
        stepped.clear()
        MODEL(ids[:, :1], state=state, ops=ops)
        MODEL(ids[:, :1], ops=ops, lengths=[1, 1])
        assert stepped == ["step"] * 2 * LAYERS
        stepped.clear()
    MODEL(ids[:, :1], state=state, ops=ops)
    assert stepped == ["lines"] * LAYERS
    logits = MODEL(ids[:, :1], state=state, ops=ops).logits
    assert all(g.any() for g in torch.autograd.grad(logits.sum(), list(MODEL.backbone.layers[0].mixer.parameters())))


@pytest.mark.parametrize("site", SITES)
def test_a_layer_of_which_something_inside_is_named_runs_line_by_line(site: str, stepped: list[str]) -> None:
    place = getattr(at, site)(**({"layer": 1} if SITES[site].layered else {}), pos=3)
    for edits, record in (([Scale(place, 0.9)], []), ([], [place])):
        stepped.clear()
        generate(MODEL, draw_ids(2, 3), 3, edits, record, backend="torch")
        prompt, first, second = (stepped[i * LAYERS : (i + 1) * LAYERS] for i in range(3))
        assert prompt == ["lines"] * LAYERS and second == ["step"] * LAYERS and len(stepped) == 3 * LAYERS
        assert first == ["lines" if site in INSIDE and i == 1 else "step" for i in range(LAYERS)]


def test_a_tap_that_does_not_say_where_it_acts_is_asked_everywhere(stepped: list[str]) -> None:
    class Doubled(Tap):
        def __call__(self, site: str, value: Tensor, t: int | None = None) -> Tensor:
            return 2 * value if site == "gated" else value

    ids, ops = draw_ids(2, 1), resolve("torch")
    with torch.no_grad():
        near(MODEL(ids, tap=Doubled(), ops=ops).logits, MODEL(ids, tap=Doubled(), ops=READABLE).logits)
    assert stepped == ["lines"] * LAYERS


# -- generation under edits -------------------------------------------------------------------------------------------


@FAST
@pytest.mark.parametrize("site", ADDRESSABLE)
def test_edits_and_recordings_of_what_is_generated(site: str, backend: str) -> None:
    """At positions of the prompt, of single new tokens and of all, ragged prompts: as the readable one has it."""
    place, layer = getattr(at, site), {"layer": 1} if ADDRESSABLE[site].layered else {}
    edits = [
        Scale(place(**layer, pos=1), 0.8),
        Scale(place(**layer, pos=[6, 7]), 1.3),
        Add(at.resid_post(layer=0, pos=7), 0.4),
        Zero(at.state_write(layer=2, pos=slice(7, None, 2))),
    ]
    record = [place(**layer, pos=slice(2, None)), place(**layer, pos=7), at.y(layer=0, pos=6)]
    ids = draw_ids(3, 5)
    got, want = (
        generate(MODEL, ids, 6, edits, record, backend=name, lengths=[5, 3, 4]) for name in (backend, "reference")
    )
    assert torch.equal(got.ids, want.ids)
    near(got.logits, want.logits, 1e-11)
    for address in record:
        assert torch.equal(got[address].isnan(), want[address].isnan())
        near(got[address].nan_to_num(), want[address].nan_to_num(), 1e-11)
    plain = generate(MODEL, ids, 6, backend=backend, lengths=[5, 3, 4])
    assert (plain.logits - got.logits).abs().max() > 1e-3


@FAST
def test_a_state_that_is_set_while_generating_is_handed_on(backend: str) -> None:
    ids, c = draw_ids(1, 4), MODEL.config
    value = torch.randn(1, c.d_inner, c.d_state + c.d_conv, dtype=torch.float64)
    edits = [Set(at.recurrent_state(layer=1, pos=6), value), Apply(at.ssm_state(layer=0, pos=5), torch.tanh)]
    made = generate(MODEL, ids, 5, edits, backend=backend)
    with torch.no_grad():
        whole = run(MODEL, made.ids[:, :-1], edits, backend="reference")
    near(made.logits, whole.logits, 1e-11)
    assert torch.equal(logit_diff(made.last_logits, 1, 2), logit_diff(made.logits[:, -1], 1, 2))


def test_the_plan_says_how_far_it_acts() -> None:
    sizes, stop = torch.tensor([4, 2]), torch.tensor([9, 7])
    edits = [Zero(at.u(layer=0, pos=5)), Zero(at.z(layer=1, pos=slice(-1, None, 3)))]
    plan = Plan(MODEL.config, edits, [at.y(layer=0, pos=1)], torch.zeros(2, dtype=torch.long), stop, sizes)
    # u at 5 is the second new token of row 0, the fourth of row 1; z is at the prompt's end and three further; y before
    assert {t for t in plan.beyond(sizes) if t >= 0} == {1, 2, 3}


@FAST
def test_an_overflow_is_named_though_it_comes_late(backend: str) -> None:
    broken = [Scale(at.resid_post(layer=2, pos=6), 1e308, rows=[1]), Scale(at.final_norm(pos=6), 1e308, rows=[1])]
    ids = draw_ids(2, 4)
    for temperature in (0.0, 1.0):
        with pytest.raises(InputError, match=r"the logits of row 1 hold NaN where new token 3"):
            generate(MODEL, ids, 5, broken, backend=backend, temperature=temperature)


# -- the norm between two layers --------------------------------------------------------------------------------------


@pytest.mark.skipif("compiled" not in HERE, reason="needs numba")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True])
def test_a_sum_and_its_norm(dtype: torch.dtype, grad: bool) -> None:
    add_norm: Callable[..., tuple[Tensor, Tensor]] | None = resolve("compiled").add_norm
    assert add_norm is not None
    g = torch.Generator().manual_seed(0)
    resid, mixed = torch.randn(2, 2, 7, 40, generator=g).to(dtype).unbind(0)
    norm = RMSNorm(40, 1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(40, generator=g) + 0.5)
    near_enough = {torch.float64: 1e-14, torch.float32: 2e-7, torch.bfloat16: 0.0}[dtype]
    with torch.set_grad_enabled(grad):
        for plus in (mixed, None, mixed.mT.contiguous().mT):
            total, normal = add_norm(resid, plus, norm)
            want = resid if plus is None else resid + plus
            assert torch.equal(total, want) and normal.requires_grad == grad
            near(normal, norm(want), near_enough)


def test_the_readable_conv_still_steps() -> None:
    """Control: `READABLE` has no step, so that it is what the others are held against."""
    assert READABLE.step is None and READABLE.add_norm is None and READABLE.conv is causal_conv

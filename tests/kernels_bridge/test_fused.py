"""The fused backend's logic in float64: the kernels replaced, in their layout, by plain PyTorch (`stand_ins`).

What runs here is all of the bridge but the kernels: virtual tokens, stretches, windows, gradients, the fused block.
"""

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import by_turns, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import CONFIG, MODEL, agree, everything, scene_of
from stand_ins import STAND_INS, register
from torch import Tensor

from interp import Add, Mean, Scale, Set, Zero, at, generate, gradients, logit_diff, run
from kernels_bridge import resolve
from kernels_bridge.fused import make
from minimal_mamba import SITES, Mamba, Plan
from minimal_mamba.block import INSIDE
from minimal_mamba.errors import BackendUnavailable
from minimal_mamba.sites import ADDRESSABLE

RECURRENCE = ("decay", "state_write", "ssm_state", "state_read")


class Counted:
    """Stand-ins that count their calls, and keep the length of each scan."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.lengths: list[int] = []
        self.kernels = dataclasses.replace(
            STAND_INS,
            **{f.name: self.count(f.name) for f in dataclasses.fields(STAND_INS) if f.name.endswith(("fn", "update"))},
        )

    def count(self, name: str) -> Callable[..., Any]:
        inner = getattr(STAND_INS, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            if name == "selective_scan_fn":
                self.lengths.append(args[0].shape[-1])
            return inner(*args, **kwargs)

        return counted

    def take(self) -> dict[str, int]:
        taken, self.calls, self.lengths = self.calls, {}, []
        return taken


@pytest.fixture(autouse=True)
def counted() -> Iterator[Counted]:
    count = Counted()
    with pytest.MonkeyPatch.context() as patch:
        register(count.kernels, patch)
        yield count


def draw_ids(b: int, l: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 29, (b, l), generator=torch.Generator().manual_seed(seed))


def near(got: Tensor, want: Tensor, tol: float = 1e-10) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    error = (got - want).norm() / want.norm().clamp(min=1e-9)
    assert error <= tol, f"off by {error:.1e}"


# -- against the readable model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("site", "keep"), by_turns(ADDRESSABLE))
def test_it_agrees_under_drawn_edits(site: str, keep: bool) -> None:
    """Logits, recordings, states, and the gradients of all parameters, edit values and carried states."""

    @settings(derandomize=True, deadline=None, max_examples=3, database=None)
    @given(st.integers(0, 2**32))
    def check(seed: int) -> None:
        scene = scene_of(seed, site=site)
        agree(everything(scene, "reference", keep), everything(scene, "fused", keep))

    check()


@pytest.mark.parametrize("l", [1, 2, 7, 63])
def test_it_agrees_at_every_length_and_says_so(l: int) -> None:
    ids = draw_ids(2, l)
    for keep in (True, False):
        want, got = (run(MODEL, ids, backend=name, keep_state=keep) for name in ("reference", "fused"))
        near(got.logits, want.logits)
        assert got.backend == "fused[stand-ins]"


@pytest.mark.parametrize("seed", range(12))
def test_one_pass_is_token_by_token_is_pieces(seed: int) -> None:
    scene, r = scene_of(seed, padded=False, carried=False), random.Random(seed)
    ids, _, _, edits, record = scene
    b, l = ids.shape
    with torch.no_grad():  # single steps run on the kernels for decoding
        whole = run(MODEL, ids, edits, record, "reference", keep_state=True)
        cuts = sorted(r.sample(range(1, l), r.randint(0, l - 1)))
        for pieces in ([1] * l, [b - a for a, b in zip([0, *cuts], [*cuts, l], strict=True)]):
            zero = torch.zeros(b, dtype=torch.long)
            plan, state, logits = Plan(CONFIG, edits, record, zero, zero + l), None, []
            for piece in ids.split(pieces, 1):
                out = MODEL(piece, state=state, keep_state=True, tap=plan, ops=resolve("fused"))
                state, logits = out.state, [*logits, out.logits]
            records = plan.results()
            one = {"logits": whole.logits} | {str(a): whole[a] for a in record}
            two = {"logits": torch.cat(logits, 1)} | {str(a): records[a] for a in record}
            for i in range(CONFIG.n_layer):
                one |= {f"h{i}": whole.state.ssm_state[i], f"c{i}": whole.state.conv_state[i]}
                two |= {f"h{i}": state.ssm_state[i], f"c{i}": state.conv_state[i]}
            agree(one, two)


def test_decoding_uses_the_step_kernels_and_changes_no_state(counted: Counted) -> None:
    ids = draw_ids(2, 5)
    start = run(MODEL, ids, backend="fused", keep_state=True).state
    kept = [t.clone() for t in (*start.ssm_state, *start.conv_state)]
    counted.take()
    with torch.no_grad():
        run(MODEL, ids[:, :1], backend="fused", state=start, record=[at.recurrent_state(), at.state_write()])
    layers = CONFIG.n_layer
    assert counted.take() == {
        "selective_state_update": layers, "causal_conv1d_update": layers, "layer_norm_fn": layers
    }  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(kept, (*start.ssm_state, *start.conv_state), strict=True))
    edits = [Set(at.ssm_state(layer=1, pos=8), 0.3), Scale(at.dt(layer=0, pos=slice(3, None)), 0.9)]
    want, got = (generate(MODEL, ids, 6, edits, backend=name) for name in ("reference", "fused"))
    assert torch.equal(want.ids, got.ids)
    near(got.logits, want.logits)


def test_with_gradients_one_token_goes_through_the_scan(counted: Counted) -> None:
    """The step kernels have no backward: a gradient through them would be zero, without an error."""
    ids = draw_ids(2, 4)

    def through(backend: str) -> list[Tensor]:
        state = run(MODEL, ids, backend=backend, keep_state=True).state
        h = [s.detach().requires_grad_() for s in (*state.ssm_state, *state.conv_state)]
        n = CONFIG.n_layer
        state = dataclasses.replace(state, ssm_state=tuple(h[:n]), conv_state=tuple(h[n:]))
        out = run(MODEL, ids[:, :1], backend=backend, state=state)
        return list(torch.autograd.grad(out.logits.square().sum(), h))

    for got, want in zip(through("fused"), through("reference"), strict=True):
        assert want.any()
        near(got, want)
    assert "selective_state_update" not in counted.take()


# -- what runs when ---------------------------------------------------------------------------------------------------


def test_an_untouched_layer_is_one_call(counted: Counted) -> None:
    ids, layers = draw_ids(2, 9), CONFIG.n_layer
    clean = {"mamba_inner_fn": layers, "layer_norm_fn": layers}
    run(MODEL, ids, backend="fused")
    assert counted.take() == clean
    run(MODEL, ids, backend="fused", lengths=[9, 4], record=[at.resid_pre(), at.mixer_out(), at.mixer_in()])
    assert counted.take() == clean | {"layer_norm_fn": layers}
    run(MODEL, ids, backend="fused", edits=[Zero(at.x(layer=1, pos=3))])
    assert counted.take() == {
        "mamba_inner_fn": layers - 1, "layer_norm_fn": layers, "causal_conv1d_fn": 1, "selective_scan_fn": 1
    }  # fmt: skip
    run(MODEL, ids, backend="fused", record=[at.resid_post(layer=1)])
    assert counted.take() == clean | {"layer_norm_fn": layers - 1}


def test_falcon_mamba_goes_line_by_line(counted: Counted) -> None:
    """mamba-ssm's block would give other outputs, and gradients of neither (`tests/kernels/test_bridge.py`)."""
    model, ids = tiny(seed=5, mixer_rms_eps=0.01), draw_ids(2, 9)
    want, got = (run(model, ids, backend=b, lengths=[9, 4]).logits for b in ("reference", "fused"))
    assert counted.take() == dict.fromkeys(["layer_norm_fn", "causal_conv1d_fn", "selective_scan_fn"], CONFIG.n_layer)
    near(got, want)
    grads = (torch.autograd.grad(out.square().sum(), [*model.parameters()]) for out in (got, want))
    for found, right in zip(*grads, strict=True):
        near(found, right)


@pytest.mark.parametrize("site", INSIDE)
def test_whatever_is_named_inside_a_layer_opens_its_block(site: str, counted: Counted) -> None:
    run(MODEL, draw_ids(2, 3), backend="fused", record=[getattr(at, site)(layer=1)])
    assert counted.take()["mamba_inner_fn"] == CONFIG.n_layer - 1


def test_no_site_is_forgotten() -> None:
    assert {"x", "gated", *RECURRENCE, "conv_state"} < {*INSIDE} < {*SITES} - {"mixer_in", "mixer_out"}


P = [2, 5, 7]
STATES = torch.linspace(-1, 1, 360, dtype=torch.float64).reshape(1, 3, 24, 5)
ONE_CALL = {
    "recorded": ([], [at.ssm_state(layer=0, pos=P), at.decay(layer=0)]),
    "read edited": ([Scale(at.state_read(layer=0, pos=P), 0.5)], []),
    "set": (
        [Set(at.ssm_state(layer=0, pos=P), torch.linspace(-1, 1, 360).double().reshape(1, 3, 24, 5))],
        [at.ssm_state(layer=0)],
    ),
    "zeroed": ([Zero(at.ssm_state(layer=0, pos=P))], [at.state_read(layer=0, pos=3)]),
    "given a mean": ([Mean(at.ssm_state(layer=0, pos=P), 0.2)], []),
    "set, then more": ([Set(at.ssm_state(layer=0, pos=P), 0.4), Scale(at.ssm_state(layer=0, pos=5, e=3), 2.0)], []),
    "set, and its read": ([Set(at.ssm_state(layer=0, pos=5), 0.4), Scale(at.state_read(layer=0, pos=5), 2.0)], []),
}
STRETCHES = {
    "scaled": [Scale(at.ssm_state(layer=0, pos=P), 0.5)],
    "added": [Add(at.ssm_state(layer=0, pos=P), 0.5)],
    "in part": [Set(at.ssm_state(layer=0, pos=P, n=2), 0.5)],
    "some rows": [Set(at.ssm_state(layer=0, pos=P), 0.5, rows=[1])],
    "batch mean": [Mean(at.ssm_state(layer=0, pos=P))],
    "decay": [Set(at.ssm_state(layer=0, pos=P), 0.5), Scale(at.decay(layer=0, pos=P), 0.5)],
    "write": [Zero(at.state_write(layer=0, pos=P))],
}


@pytest.mark.parametrize("name", ONE_CALL)
def test_what_takes_one_call(name: str, counted: Counted) -> None:
    edits, record = ONE_CALL[name]
    record = [at.ssm_state(layer=0, pos=-1), *record]
    want, got = (run(MODEL, draw_ids(2, 9), edits, record, backend=b) for b in ("reference", "fused"))
    assert counted.take()["selective_scan_fn"] == 1
    near(got.logits, want.logits)
    for address in record:
        near(got[address], want[address])


@pytest.mark.parametrize("name", STRETCHES)
def test_what_takes_a_call_a_stretch(name: str, counted: Counted) -> None:
    want, got = (run(MODEL, draw_ids(2, 9), STRETCHES[name], backend=b) for b in ("reference", "fused"))
    assert counted.take()["selective_scan_fn"] == len(P) + 1
    near(got.logits, want.logits)


def test_a_set_over_some_rows_and_the_others_takes_stretches_but_is_right() -> None:
    """Two edits that together cover the batch: neither alone does, so the position is stepped."""
    edits = [Set(at.ssm_state(layer=0, pos=4), 0.5, rows=[1]), Set(at.ssm_state(layer=0, pos=4), 0.1, rows=[0])]
    want, got = (run(MODEL, draw_ids(2, 9), edits, backend=b) for b in ("reference", "fused"))
    near(got.logits, want.logits)


def test_virtual_tokens_are_as_many_as_promised(counted: Counted) -> None:
    n, ids = CONFIG.d_state, draw_ids(2, 9)
    with torch.no_grad():
        run(MODEL, ids, backend="fused", record=[at.ssm_state(layer=0, pos=P)])
        assert counted.lengths == [9 + 3 * n]
        counted.take()
        run(MODEL, ids, [Set(at.ssm_state(layer=0, pos=P), 0.5)], backend="fused")
        assert counted.lengths == [9 + 3 * (n + 1)]
        counted.take()
        run(MODEL, ids, backend="fused", keep_state=True)
        assert counted.lengths == [9] * CONFIG.n_layer  # without gradients the kernel's own last state serves
    counted.take()
    run(MODEL, ids, backend="fused", keep_state=True)
    assert counted.lengths == [9 + n] * CONFIG.n_layer
    counted.take()
    metric = lambda logits: logit_diff(logits[:, -1], torch.tensor([3, 4]), torch.tensor([5, 6]))  # noqa: E731
    gradients(MODEL, ids, metric, [at.ssm_state(layer=1, pos=P)], backend="fused")
    assert counted.lengths == [9 + 3 * (n + 1)]


@pytest.mark.parametrize("site", [*RECURRENCE, "conv_state", "u", "dt", "resid_pre", "mixer_out"])
def test_gradients_of_sites(site: str) -> None:
    ids = draw_ids(2, 9)
    metric = lambda logits: logit_diff(logits[:, -1], torch.tensor([3, 4]), torch.tensor([5, 6]))  # noqa: E731
    edits = [Set(at.ssm_state(layer=1, pos=4), 0.3), Scale(at.ssm_state(layer=1, pos=6), 0.7)]
    where = [getattr(at, site)(), getattr(at, site)(layer=1, pos=[3, 4, 5, 6])]
    for lengths in (None, [9, 8]):
        want, got = (
            gradients(MODEL, ids, (lambda x: metric(x)), where, edits, backend=b, lengths=lengths)
            for b in ("reference", "fused")
        )
        for address in where:
            assert want[address].any()
            near(got[address], want[address])


def test_without_the_read_out_the_last_state_has_no_gradient() -> None:
    """Control: what the kernel gives back as the last state trains nothing, and says nothing."""
    u = torch.rand(1, 4, 6, dtype=torch.float64, requires_grad=True)
    A, B = -torch.rand(6, 3, dtype=torch.float64), torch.rand(1, 4, 3, dtype=torch.float64)
    turned = [x.transpose(1, 2) for x in (u, u, B, B)]
    _, last = STAND_INS.selective_scan_fn(turned[0], turned[1], A, turned[2], turned[3], return_last_state=True)
    assert last.requires_grad and not torch.autograd.grad(last.sum(), u)[0].any()
    assert not STAND_INS.scan(u, u, A, B, B)[1].requires_grad  # so that nobody takes it for one that has


def test_the_kernels_own_states_in_one_call(counted: Counted) -> None:
    names = ("u", "dt", "B")
    done = run(MODEL, draw_ids(2, 7), record=[at.ssm_state(layer=0), *(getattr(at, s)(layer=0) for s in names)])
    u, dt, B = (done[getattr(at, s)(layer=0)] for s in names)
    A = -torch.exp(MODEL.backbone.layers[0].mixer.A_log)
    counted.take()
    near(counted.kernels.states(u, dt, A, B), done[at.ssm_state(layer=0)])
    assert counted.take() == {"selective_scan_fn": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_fewer_bits_it_errs_as_the_readable_model_does(dtype: torch.dtype) -> None:
    ids, edits = draw_ids(2, 9), [Set(at.ssm_state(layer=1, pos=4), 0.3), Scale(at.ssm_state(layer=0, pos=6), 0.7)]
    small = tiny(seed=5).to(dtype)
    exact = Mamba(small.config).double()
    exact.load_state_dict(small.state_dict())
    want = run(exact, ids, edits, backend="reference").logits
    error = {}
    for name, keep in itertools.product(("reference", "fused"), (True, False)):
        got = run(small, ids, edits, backend=name, keep_state=keep).logits
        error[name, keep] = float(((got - want).norm() / want.norm()).detach())
    for keep in (True, False):
        assert error["fused", keep] <= 2 * error["reference", keep] + 1e-6, error


def test_non_contiguous_input_works() -> None:
    """Weights and ids that are views, and a batch whose layout is transposed."""
    views = tiny(seed=5)
    with torch.no_grad():
        for p in views.parameters():
            if p.dim() == 2:
                p.data = p.data.T.contiguous().T
    ids = draw_ids(9, 4).T
    near(run(views, ids, backend="fused").logits, run(MODEL, ids.contiguous(), backend="fused").logits)
    near(run(views, ids, backend="fused", keep_state=True).logits, run(MODEL, ids, backend="reference").logits)


def test_one_row_of_one_token_has_strides_that_the_kernel_takes() -> None:
    """Trap: a transposed view of one position is contiguous already, so `.contiguous()` copies nothing."""
    want, got = (run(MODEL, draw_ids(1, 1), record=[at.conv()], backend=b) for b in ("reference", "fused"))
    near(got.logits, want.logits)


# -- what it refuses --------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], Callable[[Mamba], Any], str]] = {
    "a wide kernel": ({"d_conv": 5}, lambda m: m, "d_conv is 5; causal-conv1d's kernels take 2, 3 and 4"),
    "a narrow kernel": ({"d_conv": 1}, lambda m: m, "d_conv is 1"),
    "a large state": ({"d_state": 257, "n_layer": 1}, lambda m: m, "d_state is 257; the scan's kernel takes at most"),
    "mixed types": (
        {},
        lambda m: m.backbone.norm_f.half(),
        r"torch.float16, torch.float32; cast the whole model",
    ),
    "mixed devices": ({}, lambda m: m.backbone.norm_f.to("meta"), r"are on cpu, meta; move the whole model to one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_cannot_run_is_refused(name: str) -> None:
    sizes, change, text = REFUSED[name]
    model = tiny(dtype=torch.float32, **sizes)
    change(model)
    with pytest.raises(BackendUnavailable, match=text):
        run(model, draw_ids(2, 3), backend="fused")


@pytest.mark.parametrize("d_conv", [2, 3, 4])
def test_all_that_the_kernels_take_runs(d_conv: int) -> None:
    model = tiny(d_conv=d_conv, conv_bias=d_conv != 3, bias=d_conv == 2, rms_norm=d_conv != 2, n_layer=2)
    for l in (1, 2, 7):
        for keep in (False, True):
            want, got = (run(model, draw_ids(2, l), backend=b, keep_state=keep) for b in ("reference", "fused"))
            near(got.logits, want.logits)


def test_float32_A_and_D_beside_16_bits_are_no_mixture() -> None:
    """As mamba-ssm builds its models."""
    model = tiny(dtype=torch.bfloat16)
    for layer in model.backbone.layers:
        layer.mixer.A_log.data, layer.mixer.D.data = layer.mixer.A_log.data.float(), layer.mixer.D.data.float()
    assert run(model, draw_ids(2, 3), backend="fused").logits.isfinite().all()


def test_float64_and_a_cpu_are_refused_by_the_real_kernels() -> None:
    real = dataclasses.replace(STAND_INS, device="cuda", dtypes=(torch.float32,), name="fused")
    with pytest.raises(BackendUnavailable, match=r"on cpu; move the model with model.to\('cuda'\)"):
        MODEL(draw_ids(1, 2), ops=make(lambda: real))
    with pytest.raises(BackendUnavailable, match=r"torch.float64; the kernels take torch.float32; use backend='torch'"):
        MODEL(draw_ids(1, 2), ops=make(lambda: dataclasses.replace(real, device="cpu")))

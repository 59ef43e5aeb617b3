"""The fused backend on the packages' own code, in their layout, against the readable model in float64.

The autograd functions are the real ones, so what they leave out is left out here; of the kernels themselves `conftest`
says which they are. The same logic at float64's precision: `test_fused.py`.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import by_turns, error, tiny
from scenes import CONFIG, MODEL, everything, scene_of
from stand_ins import layer_norm_fn, register
from torch import Tensor
from torch.nn import functional as F

from interp import Scale, Set, Zero, at, generate, gradients, logit_diff, run
from kernels_bridge import backends
from kernels_bridge.fused import FUSED, kernels, load
from kernels_bridge.harness.targets import roundings
from minimal_mamba import Mamba, block
from minimal_mamba.block import divided
from minimal_mamba.errors import BackendUnavailable
from minimal_mamba.scan import READABLE
from minimal_mamba.sites import ADDRESSABLE
from minimal_mamba.tap import NO_TAP

KERNELS = dataclasses.replace(load(), name="fused[on a CPU]", device="cpu")
SINGLE = tiny(seed=5).float()
EXACT = Mamba(SINGLE.config).double()
EXACT.load_state_dict(SINGLE.state_dict())


@pytest.fixture
def plain_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """For long rows: in Triton's interpreter a norm takes a hundred times as long as all else."""
    register(dataclasses.replace(KERNELS, layer_norm_fn=layer_norm_fn), monkeypatch)


@pytest.fixture(autouse=True)
def substituted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        register(KERNELS, patch)
        yield


def draw_ids(b: int, l: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 29, (b, l), generator=torch.Generator().manual_seed(seed))


def test_users_never_get_these_kernels() -> None:
    missing = [need.name for need in backends._FUSED_NEEDS if not need.here(torch.device("cpu"))]
    assert missing[0] == "a model on a CUDA device"
    with pytest.raises(BackendUnavailable, match=r"on cpu; move the model with model.to\('cuda'\)"):
        SINGLE(draw_ids(1, 2), ops=FUSED)


@pytest.mark.parametrize("l", [1, 2, 3, 5, 17, 33])
def test_every_length(l: int) -> None:
    """The error is held against the readable model's own in float32: how much of it a prompt makes is the prompt's.

    Of two rows of one token that is a few draws, lucky on some processors: several roundings of it count.
    """
    ids = draw_ids(2, l)
    want = run(EXACT, ids, backend="reference", keep_state=True)
    plain = max(error(run(one.model, ids, backend="reference").logits, want.logits) for one in roundings(SINGLE))
    for keep in (True, False):
        got = run(SINGLE, ids, backend="fused", keep_state=keep)
        assert got.backend == "fused[on a CPU]"
        assert error(got.logits, want.logits) <= 4 * plain + 5e-7, plain
    assert got.kept is None


@pytest.mark.parametrize(("site", "keep"), by_turns(ADDRESSABLE))
def test_under_drawn_edits(site: str, keep: bool) -> None:
    """Logits, recordings, states and gradients; each error is held against the readable model's own in float32."""
    with pytest.MonkeyPatch.context() as patch:
        for seed in range(2):
            scene = scene_of(seed, site=site)
            patch.setattr("scenes.MODEL", EXACT)
            want = everything(scene, "reference", keep)
            patch.setattr("scenes.MODEL", SINGLE)
            plain, got = everything(scene, "reference", keep), everything(scene, "fused", keep)
            for name, value in want.items():
                scale = max(1.0, float(value.nan_to_num().abs().max())) if value.numel() else 1.0
                assert torch.equal(value.isnan(), got[name].isnan()), name
                gaps = [float((x[name].double() - value).nan_to_num().norm()) for x in (got, plain)]
                assert gaps[0] <= 4 * gaps[1] + 2e-5 * scale * math.sqrt(value.numel() or 1), (name, gaps)


@pytest.mark.parametrize("block", [True, False])
def test_gradients_of_every_parameter(block: bool) -> None:
    """Of a loss on the logits: through `mamba_inner_fn`'s own backward, and, with a site named inside, the scan's."""
    ids = draw_ids(3, 17)
    found = {}
    for name, model, backend in (("want", EXACT, "reference"), ("got", SINGLE, "fused")):
        record = [] if block else [at.u(layer=i) for i in range(CONFIG.n_layer)]
        out = run(model, ids, record=record, backend=backend, lengths=[17, 9, 1])
        loss = torch.logsumexp(out.logits, -1).square().sum()
        found[name] = torch.autograd.grad(loss, [*model.parameters()])
    for (name, _), want, got in zip(EXACT.named_parameters(), found["want"], found["got"], strict=True):
        assert want.any() and error(got, want) < 2e-5, name


@pytest.mark.usefixtures("plain_norm")
@pytest.mark.parametrize("stop", [4, 128])
@pytest.mark.parametrize("site", ["ssm_state", "conv_state"])
def test_stretches_that_are_loaded_sixteen_bytes_at_once(site: str, stop: int) -> None:
    """A stretch is a slice of what the layer made, whose rows begin anywhere; `conftest.loadable` raises."""
    ids, edits = draw_ids(2, 131), [Scale(getattr(at, site)(pos=stop), 0.5)]
    with torch.no_grad():
        want, got = (run(m, ids, edits, backend=b).logits for m, b in ((EXACT, "reference"), (SINGLE, "fused")))
    assert error(got, want) < 5e-6
    for metric in (lambda x: x.square().sum((1, 2)), lambda x: x[:, :stop].square().sum((1, 2))):
        places = [at.u(layer=0), at.x(layer=1), at.dt(layer=0), at.B(layer=0), at.C(layer=1)]
        want_g, got_g = (
            gradients(m, ids, metric, places, edits, backend=b) for m, b in ((EXACT, "reference"), (SINGLE, "fused"))
        )
        for place in places:
            assert error(got_g[place], want_g[place]) < 2e-5, place


@pytest.mark.parametrize("site", ["resid_pre", "dt", "x", "mixer_out"])  # the block, the scan, the conv, the norm
def test_second_gradients_are_refused(site: str) -> None:
    """What the kernels' backward gives, autograd takes for constants."""
    ids, place = draw_ids(1, 6), getattr(at, site)(layer=2, pos=2)
    value = run(SINGLE, ids, record=[place], backend="reference")[place].detach()
    with pytest.raises(BackendUnavailable, match="create_graph"):
        torch.autograd.functional.hessian(
            lambda v: run(SINGLE, ids, Set(place, v), backend="fused").logits.sum(), value
        )


def test_gradients_of_biases() -> None:
    """mamba-ssm's own backward of the block sums that of `out_proj.bias` over all axes; ours keeps it outside."""
    small = tiny(seed=5, bias=True, dtype=torch.float32)
    exact = Mamba(small.config).double()
    exact.load_state_dict(small.state_dict())
    grads = [
        torch.autograd.grad(run(m, draw_ids(2, 5), backend=b).logits.square().sum(), [*m.parameters()])
        for m, b in ((exact, "reference"), (small, "fused"))
    ]
    for (name, _), want, got in zip(exact.named_parameters(), *grads, strict=True):
        assert want.any() and error(got, want) < 2e-5, name


@pytest.mark.usefixtures("plain_norm")
@pytest.mark.parametrize("l", [512, 513, 515, 516])
def test_gradients_of_rows_that_end_just_after_a_chunk(l: int) -> None:
    small = tiny(seed=5, n_layer=1, d_model=4, d_state=2).float()
    exact = Mamba(small.config).double()
    exact.load_state_dict(small.state_dict())
    grads = []
    for m, b in ((exact, "reference"), (small, "fused")):
        logits = run(m, draw_ids(1, l), backend=b).logits[:, 511:]
        grads.append(torch.autograd.grad(logits.square().sum(), [*m.parameters()]))
    for (name, _), want, got in zip(exact.named_parameters(), *grads, strict=True):
        assert want.any() and error(got, want) < 2e-5, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [2, 4])
def test_the_convolutions_own_backward_is_wrong_where_rows_are_lengthened(dtype: torch.dtype, k: int) -> None:
    rng = torch.Generator().manual_seed(0)
    for l in (3, 129, 511, 512, 513, 515, 516, 1023, 1025, 1027, 1028, 1031, 1032, 2049):
        x, g = (torch.randn(2, 3, l, generator=rng).to(dtype) for _ in range(2))
        weight, bias = (torch.randn(3, *size, generator=rng).requires_grad_() for size in ((k,), ()))
        y = KERNELS.causal_conv1d_fn(x, weight, bias, activation="silu")
        got = torch.autograd.grad(y, (weight, bias), g)
        wide = F.conv1d(F.pad(x.double(), (k - 1, 0)), weight.double()[:, None], bias.double(), groups=3)
        want = torch.autograd.grad(F.silu(wide), (weight, bias), g.double())
        wrong = max(error(a, b) for a, b in zip(got, want, strict=True)) > 1e-5
        assert wrong == (kernels._lengthened(x).shape[2] > l), l


def falcon() -> tuple[Mamba, Mamba]:
    small = tiny(seed=5, mixer_rms_eps=1e-3).float()
    exact = Mamba(small.config).double()
    exact.load_state_dict(small.state_dict())
    return small, exact


def test_falcon_mamba() -> None:
    small, exact = falcon()
    ids, edits = draw_ids(3, 17), [Set(at.ssm_state(layer=1, pos=4), 0.3), Scale(at.dt_low(layer=2, pos=3), 0.5)]
    for some in ([], edits):
        found = []
        for model, backend in ((exact, "reference"), (small, "fused"), (small, "reference")):
            logits = run(model, ids, some, backend=backend, lengths=[17, 9, 5]).logits
            found.append([logits, *torch.autograd.grad(logits.square().sum(), [*model.parameters()])])
        for want, got, plain in zip(*found, strict=True):
            assert want.any() and error(got, want) <= 4 * error(plain, want) + 5e-6


@pytest.mark.parametrize("elsewhere", [False, True])
def test_mamba_ssms_own_block_is_no_falcon_mamba(elsewhere: bool) -> None:
    """It divides dt behind `dt_proj`, over all channels, where transformers divides dt_low, unless it trains through
    this; and its backward takes what it divides by for constants.
    """
    small, exact = falcon()
    m, wide, eps = small.backbone.layers[0].mixer, exact.backbone.layers[0].mixer, 1e-3
    rng = torch.Generator().manual_seed(0)
    x, g = (torch.randn(2, 9, 12, generator=rng) for _ in range(2))
    b, c, dt = (torch.ones(size) for size in (5, 5, 24))
    got = KERNELS.mamba_inner_fn(
        m.in_proj(x).transpose(1, 2), m.conv1d.weight, m.conv1d.bias, m.x_proj.weight, m.dt_proj.weight,
        m.out_proj.weight, None, m.A(torch.float32), None, None, m.D, delta_bias=m.dt_proj.bias, delta_softplus=True,
        b_rms_weight=b, c_rms_weight=c, dt_rms_weight=dt, b_c_dt_rms_eps=eps,
    )  # fmt: skip
    memory = exact.initial_state(2).ssm_state[0], exact.initial_state(2).conv_state[0]
    with pytest.MonkeyPatch.context() as patch:
        if elsewhere:

            def divided_behind(low: Tensor, weight: Tensor) -> Tensor:
                return divided(F_linear(low, weight), eps) if weight is wide.dt_proj.weight else F_linear(low, weight)

            F_linear = F.linear
            patch.setattr(block, "divided", lambda x, eps: x if x.shape[-1] == 4 else divided(x, eps))
            patch.setattr(F, "linear", lambda x, w, *bias: F_linear(x, w, *bias) if bias else divided_behind(x, w))
        want = wide(x.double(), memory, None, NO_TAP, READABLE)[0]
    off = error(got, want)
    assert off < 1e-5 if elsewhere else off > 0.1
    names = ("x_proj.weight", "dt_proj.weight", "conv1d.weight", "in_proj.weight")
    found, right = (
        torch.autograd.grad((y * g).sum(), [dict(mixer.named_parameters())[n] for n in names])
        for y, mixer in ((got, m), (want, wide))
    )
    assert all(error(a, b) > 0.1 for a, b in zip(found, right, strict=True))


def test_gradients_of_states_carried_and_edited() -> None:
    """The last state's gradient, which the kernel's backward ignores; the initial state's; sites' own."""
    ids = draw_ids(2, 7)
    found = {}
    for name, model, backend in (("want", EXACT, "reference"), ("got", SINGLE, "fused")):
        blank = model.initial_state(2)
        g = torch.Generator().manual_seed(1)
        start = [
            torch.randn(t.shape, generator=g).to(t.dtype).requires_grad_()
            for t in (*blank.ssm_state, *blank.conv_state)
        ]
        state = dataclasses.replace(blank, ssm_state=tuple(start[:3]), conv_state=tuple(start[3:]))
        out = run(model, ids, [Scale(at.ssm_state(layer=1, pos=3), 0.5)], backend=backend, state=state, keep_state=True)
        loss = sum(h.square().sum() for h in out.state.ssm_state) + out.logits.square().sum()
        found[name] = torch.autograd.grad(loss, [*start, *model.parameters()])
        metric = lambda x: logit_diff(x[:, -1], torch.tensor([3, 4]), torch.tensor([5, 6]))  # noqa: E731
        places = [at.ssm_state(), at.state_write(layer=0), at.decay(layer=1, pos=[2, 3]), at.conv_state(layer=2)]
        sites = gradients(model, ids, metric, places, [Set(at.ssm_state(layer=1, pos=4), 0.2)], backend=backend)
        found[name] = [*found[name], *(sites[p] for p in places)]
    for want, got in zip(found["want"], found["got"], strict=True):
        assert want.any() and error(got, want) < 2e-5


def test_decoding() -> None:
    """`selective_state_update` is the real Triton kernel here."""
    edits = [Set(at.ssm_state(layer=1, pos=6), 0.3), Zero(at.state_write(layer=0, pos=5)), Scale(at.dt(layer=2), 0.9)]
    want, got = generate(EXACT, draw_ids(2, 5), 5, edits, backend="reference", lengths=[5, 3]), None
    got = generate(SINGLE, draw_ids(2, 5), 5, edits, backend="fused", lengths=[5, 3])
    assert torch.equal(want.ids, got.ids) and error(got.logits, want.logits) < 5e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [True, False])
def test_sixteen_bits_err_as_the_readable_model_does(dtype: torch.dtype, keep: bool) -> None:
    small = tiny(seed=5).to(dtype)
    exact = Mamba(small.config).double()
    exact.load_state_dict(small.state_dict())
    ids, edits = draw_ids(2, 17), [Set(at.ssm_state(layer=1, pos=4), 0.3)] if keep else []
    want = run(exact, ids, edits, backend="reference").logits
    ours, plain = (
        error(run(small, ids, edits, backend=b, keep_state=keep).logits, want) for b in ("fused", "reference")
    )
    assert 0 < ours <= 1.5 * plain


def layer() -> tuple[list[Tensor], Tensor]:
    """What the scan of the first layer takes (u, dt, A, B) in float32, and its states."""
    places = [getattr(at, site)(layer=0) for site in ("u", "dt", "B", "ssm_state")]
    done = run(MODEL, draw_ids(2, 9), backend="reference", record=places)
    u, dt, B, h = (done[place].float() for place in places)
    return [u, dt, -torch.exp(MODEL.backbone.layers[0].mixer.A_log).float(), B], h.double()


def test_the_kernels_own_states_in_one_call() -> None:
    given, h = layer()
    assert error(KERNELS.states(*given), h) < 1e-6


def test_the_kernels_own_states_of_one_dimension() -> None:
    """Nothing is repeated then, and what is a slice stays one."""
    u, dt, A, B = layer()[0]
    u, dt, B = (torch.cat([x] * 15, 1).transpose(1, 2).contiguous().transpose(1, 2)[:, 1:129] for x in (u, dt, B))
    given = u, dt, A[:, :1], B[..., :1]
    assert torch.equal(KERNELS.states(*given), KERNELS.states(*(x.contiguous() for x in given)))


def test_the_kernels_own_states_where_a_launch_takes_fewer_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    given, h = layer()
    monkeypatch.setattr(kernels, "GRID", 30)
    launches = []

    def launched(u: Tensor, *rest: Tensor) -> Tensor:
        launches.append(u.shape[1])
        return KERNELS.selective_scan_fn(u, *rest)

    assert error(dataclasses.replace(KERNELS, selective_scan_fn=launched).states(*given), h) < 1e-6
    assert launches == [30] * 4


@pytest.mark.parametrize("more", [3, 4])  # of which rows or only the first number are apart from 16 bytes
@pytest.mark.parametrize("l", [8, 128])
def test_gradients_that_are_slices(l: int, more: int) -> None:
    """`dout`, too, the kernels load as it is where its positions are next to each other."""
    u, dt, A, B = (x[:, :1].expand(-1, l, -1) if x.dim() == 3 else x for x in layer()[0])
    g = torch.randn(2, 24, l + more)[:, :, 1 : l + 1].transpose(1, 2)  # of a longer sequence, channels apart
    leaf, weight = u.clone().requires_grad_(), torch.randn(24, 3)
    for call in (lambda x: KERNELS.scan(x, dt, A, B, B)[0], lambda x: KERNELS.conv(x, weight, None)):
        plain, sliced = (torch.autograd.grad(call(leaf), leaf, x)[0] for x in (g.contiguous(), g))
        assert plain.any() and torch.equal(plain, sliced)


def test_more_numbers_than_the_convolutions_offsets_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INDEX", 2 * 5 * 24)
    for keep in (False, True):  # the block, and the convolution by itself
        run(SINGLE, draw_ids(2, 4), backend="fused", keep_state=keep)
        with pytest.raises(
            BackendUnavailable, match=r"cannot run 2 rows of 5 tokens through 24 channels at once: .* 240"
        ):
            run(SINGLE, draw_ids(2, 5), backend="fused", keep_state=keep)


@pytest.mark.usefixtures("plain_norm")
def test_rows_that_are_lengthened_are_not_spread_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """The convolution's 32-bit offsets: of the channels that are its own, as before, and of the added tokens too."""
    seen = []

    def called(xz: Tensor, *rest: Any, **named: Any) -> Tensor:
        seen.append(xz.chunk(2, 1)[0])
        return KERNELS.mamba_inner_fn(xz, *rest, **named)

    register(dataclasses.replace(KERNELS, mamba_inner_fn=called, layer_norm_fn=layer_norm_fn), monkeypatch)
    run(SINGLE, draw_ids(2, 513), backend="fused")
    for x in seen:
        assert x.shape == (2, 24, 516)
        assert sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)) < x.numel()
    monkeypatch.setattr(kernels, "INDEX", 2 * 24 * 516)
    with pytest.raises(BackendUnavailable, match="cannot run 2 rows of 516 tokens"):
        run(SINGLE, draw_ids(2, 513), backend="fused")

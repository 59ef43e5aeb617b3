"""The compiled loops against a plain loop, `torch` and the readable model; their exp and 2^x over their whole range."""

from collections.abc import Sequence

import pytest
import torch
from helpers import slow, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_scan import LENGTHS, RTOL, b, e, inputs, leaves, loop, n, near
from scenes import agree, everything, scene_of
from torch import Tensor

from interp import Scale, Set, at, attribution_grid, generate, run
from kernels_bridge import resolve, torch_scan
from kernels_bridge.harness import check, target
from kernels_bridge.harness.draw import SIZES, draw_model
from kernels_bridge.harness.rows import table
from minimal_mamba.scan import READABLE
from minimal_mamba.sites import ADDRESSABLE

pytest.importorskip("numba", reason="the compiled backend needs numba")
import numpy as np

from kernels_bridge.compiled import functions, kernels, token_kernels
from kernels_bridge.compiled.scan import scan


def drawn(like: Sequence[Tensor]) -> list[Tensor]:
    g = torch.Generator().manual_seed(6)
    return [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in like]


# -- exp --------------------------------------------------------------------------------------------------------------


def ours(x: np.ndarray, base: str = "exp") -> np.ndarray:
    out = np.empty_like(x)
    getattr(functions, base)(functions.NUMBERS[x.dtype], x, out)
    return out


RANGES = pytest.mark.parametrize(("dtype", "exact", "low", "high"), [
    (np.float32, np.float64, -104.5, 89), (np.float64, np.longdouble, -746, 710),
])  # fmt: skip


def units(x: np.ndarray, exact: type, low: float, high: float, base: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Errors in units in the last place over the whole range, where it does not overflow; there; and what is exact."""
    if exact is np.longdouble and np.finfo(np.longdouble).nmant <= 52:
        pytest.skip("no type wider than float64 here")
    want, got = getattr(np, base)(x.astype(exact)), ours(x, base)
    top = want > np.finfo(x.dtype).max
    assert top.any() and np.isinf(got[top]).all()
    unit = np.spacing(want[~top].astype(x.dtype)).astype(exact)
    return np.abs(got[~top].astype(exact) - want[~top]) / unit, got[~top], want[~top]


def spread(low: float, high: float, dtype: type) -> np.ndarray:
    rng = np.random.default_rng(0)
    small = np.exp(rng.uniform(-60, 0, 100_000))
    return np.concatenate([rng.uniform(low, high, 2_000_000), small, -small]).astype(dtype)


@RANGES
def test_exp_is_within_two_units_in_the_last_place(dtype: type, exact: type, low: float, high: float) -> None:
    """Over the whole range, denormals too; measured 1.6 in float32."""
    error, got, _ = units(spread(low, high, dtype), exact, low, high, "exp")
    assert error.max() <= 2 and (got < np.finfo(dtype).tiny).sum() > 1000  # of which many are denormals or 0


@RANGES
def test_exp2_is_within_two_units_in_the_last_place(dtype: type, exact: type, low: float, high: float) -> None:
    """Of normal numbers, but for the largest half of a power of two, which may be inf; what is smaller may become 0."""
    low, high = low * 1.45, high * 1.45
    error, got, want = units(spread(low, high, dtype), exact, low, high, "exp2")
    tiny, big = np.finfo(dtype).tiny, np.finfo(dtype).max
    assert error[(want >= tiny) & (want < big / 1.42)].max() <= 2
    below = want < tiny
    assert below.sum() > 1000 and (got[below] >= 0).all() and (got[below] <= tiny).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("base", ["exp", "exp2"])
def test_exp_at_the_ends(dtype: type, base: str) -> None:
    big = np.finfo(dtype).max
    odd = np.array([np.nan], dtype).view(f"i{np.dtype(dtype).itemsize}") + 12345  # a NaN with bits of its own
    x = np.array(
        [0.0, -0.0, -np.inf, np.inf, np.nan, -big, big, np.finfo(dtype).smallest_subnormal, *odd.view(dtype)], dtype
    )
    np.testing.assert_array_equal(ours(x, base), np.array([1, 1, 0, np.inf, np.nan, 0, np.inf, 1, np.nan], dtype))


# -- the scan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("l", LENGTHS)
@pytest.mark.parametrize("extras", ["plain", "kept and added"])
def test_outputs_and_every_gradient(l: int, extras: str) -> None:
    keep: list[int] = []
    added_at: list[int] = []
    mine = leaves(inputs(l))
    if extras != "plain":
        keep = sorted({0, l // 3, l // 2, l - 1})
        added_at = sorted({0, l // 2, l // 2 + (l > 2), l - 1})
        mine += leaves(drawn([torch.empty(b, len(added_at), e, n, dtype=torch.float64)]))
    theirs = leaves(mine)
    got = scan(*mine[:6], keep=keep, added=mine[6] if added_at else None, added_at=added_at)
    want = loop(*theirs[:6], keep=keep, added=theirs[6] if added_at else None, added_at=added_at)
    for x, y in zip(got, want, strict=True):
        near(x, y)
    some = 3 if keep else 2  # no kept states, nothing to differentiate
    grads = torch.autograd.grad(got[:some], mine, drawn(want[:some]))
    wanted = torch.autograd.grad(want[:some], theirs, drawn(want[:some]))
    for x, y in zip(grads, wanted, strict=True):
        near(x, y)


@pytest.mark.parametrize(("channels", "states"), [(1, 1), (257, 16), (300, 5), (40, 130)])
def test_channels_beyond_an_item_and_odd_sizes(channels: int, states: int) -> None:
    mine = inputs(37, e=channels, n=states)
    assert channels == 1 or channels > kernels.width(states) > channels % kernels.width(states) > 0
    mine = leaves([*mine, *drawn([torch.empty(b, 2, channels, states, dtype=torch.float64)])])
    theirs, where = leaves(mine), {"keep": [3, 36], "added_at": [4, 36]}
    got, want = (way(*x[:6], added=x[6], **where) for way, x in ((scan, mine), (loop, theirs)))
    for x, y in zip(got, want, strict=True):
        near(x, y)
    grads, wanted = (torch.autograd.grad(o, i, drawn(want)) for o, i in ((got, mine), (want, theirs)))
    for x, y in zip(grads, wanted, strict=True):
        near(x, y)


@pytest.mark.parametrize("output", [0, 1, 2], ids=["y", "last state", "kept states"])
def test_each_output_has_its_own_gradient(output: int) -> None:
    mine = leaves(inputs(7, mean_dt=0.1))
    theirs = leaves(mine)
    got, want = scan(*mine, keep=[1, 5])[output], loop(*theirs, keep=[1, 5])[output]
    grads = torch.autograd.grad(got, mine, drawn([want])[0])
    wanted = torch.autograd.grad(want, theirs, drawn([want])[0], materialize_grads=True)
    for x, y in zip(grads, wanted, strict=True):
        near(x, y)


def test_gradcheck() -> None:
    added = leaves(drawn([torch.empty(b, 2, e, n, dtype=torch.float64)]))[0]

    def fn(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return scan(*args[:6], keep=[0, 3], added=args[6], added_at=[1, 4])

    assert torch.autograd.gradcheck(fn, (*leaves(inputs(5)), added), fast_mode=True)


@pytest.mark.parametrize("mean_dt", [0.01, 2.0])
def test_float32_keeps_its_digits_at_every_step_size(mean_dt: float) -> None:
    exact = leaves(inputs(300, mean_dt))
    single = leaves([t.float() for t in exact])
    want, got = loop(*exact, keep=[100, 299]), scan(*single, keep=[100, 299])
    for x, y in zip(got, want, strict=True):
        near(x.double(), y, 2e-6)
    wanted = torch.autograd.grad(want, exact, drawn(want))
    for x, y in zip(torch.autograd.grad(got, single, drawn(got)), wanted, strict=True):
        near(x.double(), y, 2e-6)


def strided(t: Tensor) -> Tensor:
    """The same values, no axis contiguous."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
    wide[..., ::2] = t
    return wide.transpose(0, -1).contiguous().transpose(0, -1)[..., ::2]


def test_strides_do_not_matter_and_inputs_are_left_as_they_are() -> None:
    plain = inputs(7)
    odd = [strided(t).requires_grad_() for t in plain]
    want, got = scan(*leaves(plain), keep=[2, 6]), scan(*odd, keep=[2, 6])
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    for x, y in zip(torch.autograd.grad(got[0].sum(), odd), leaves(plain), strict=True):
        assert x.shape == y.shape
    assert all(torch.equal(x, y) for x, y in zip(odd, plain, strict=True))
    last, kept = got[1].detach().add_(1), got[2]  # an output is a value of its own, though its state was kept too
    assert not torch.equal(last, kept[:, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", range(6), ids=["u", "dt", "A", "B", "C", "h"])
def test_what_is_not_a_number_goes_where_it_goes_in_torch(which: int, value: float, dtype: torch.dtype) -> None:
    made = [t.to(dtype) for t in inputs(40, e=19)]
    made[which][(1, 2, 2)[: made[which].dim()]] = value
    found = []
    for one in (scan, torch_scan.scan):
        mine = leaves(made)
        out = one(*mine, keep=[2, 3, 39])
        found.append([*out, *torch.autograd.grad(out[0][:, -1].sum() + out[1].sum(), mine)])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_results_do_not_depend_on_the_number_of_threads(threads: None) -> None:
    made, found = [t.float() for t in inputs(80, e=300, n=16, b=3)], []
    x, weight, bias = torch.randn(3, 400, 300), torch.randn(300, 4), torch.randn(300)
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        mine = leaves(made)
        out = scan(*mine, keep=[5])
        rest = leaves([x, weight, bias, torch.zeros(3, 300, 4)])
        conv = resolve("compiled").conv(*rest)[0]
        found.append([*out, conv, *torch.autograd.grad((*out, conv), [*mine, *rest], drawn([*out, conv]))])
    assert all(torch.equal(a, b) for more in found[1:] for a, b in zip(found[0], more, strict=True))


# -- the convolution --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("l", [1, 2, 3, 7, 63])
@pytest.mark.parametrize("bias", [True, False])
def test_the_conv_and_every_gradient(k: int, l: int, bias: bool) -> None:
    g = torch.Generator().manual_seed(k)
    sizes = [(b, l, e), (e, k), *[(e,)] * bias, (b, e, k)]
    made = [torch.randn(size, generator=g, dtype=torch.float64) for size in sizes]
    mask = torch.arange(l) < torch.tensor([[l], [max(1, l - 2)]])
    found = []
    for conv in (resolve("compiled").conv, READABLE.conv):
        mine = leaves(made)
        out = conv(mine[0], mine[1], mine[2] if bias else None, mine[-1], mask=mask)
        out = (out[0] * mask[:, :, None], out[1])
        found.append([*out, *torch.autograd.grad(out, mine, drawn(out), materialize_grads=True)])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


# -- the whole model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("l", LENGTHS)
@pytest.mark.parametrize("other", ["reference", "torch"])
def test_the_model_agrees_padded_and_carried(l: int, other: str) -> None:
    model, found = tiny(), []
    ids = torch.randint(0, 29, (2, l), generator=torch.Generator().manual_seed(l))
    for backend in ("compiled", other):
        ops = resolve(backend)
        before = model(ids.flip(1), keep_state=True, ops=ops).state
        out = model(ids, state=before, lengths=[l, max(1, l - 2)], keep_state=True, ops=ops)
        values = [out.logits, *out.state.ssm_state, *out.state.conv_state]
        found.append([*values, *torch.autograd.grad(values, list(model.parameters()), drawn(values))])
    for x, y in zip(*found, strict=True):
        near(x, y, 1e-11 if l == 500 else RTOL)


@pytest.mark.parametrize("site", list(ADDRESSABLE))
def test_it_agrees_under_drawn_edits(site: str) -> None:
    @settings(derandomize=True, deadline=None, max_examples=4, suppress_health_check=list(HealthCheck), database=None)
    @given(st.integers(0, 2**32))
    def draw(seed: int) -> None:
        scene = scene_of(seed, site=site)
        agree(everything(scene, "reference"), everything(scene, "compiled"))

    draw()


@pytest.mark.parametrize("site", ["decay", "state_write", "ssm_state", "state_read"])
@pytest.mark.parametrize("keep", ["e", "n", None])
@pytest.mark.parametrize("edited", [False, True])
def test_attribution_agrees(site: str, keep: str | None, edited: bool) -> None:
    """The move is contracted block by block; 70 tokens are three blocks, and an edit cuts them in two."""
    model, rng = tiny(), torch.Generator().manual_seed(3)
    ids, donor = torch.randint(0, 29, (2, 2, 70), generator=rng).unbind(0)
    edits = [Set(at.ssm_state(layer=1, pos=40), 0.3)] if edited else []
    one, two = (
        attribution_grid(model, ids, donor, site=site, metric=lambda x: x.square().sum((1, 2)), keep=keep,
                         edits=edits, backend=backend, lengths=[70, 50], progress=False).values
        for backend in ("compiled", "torch")
    )  # fmt: skip
    near(one, two, 1e-11)


@pytest.mark.parametrize(
    ("size", "dtype", "lengths"),
    [
        ("small", torch.float32, [37]),
        *slow(("small", torch.float64, [37])),
        ("small", torch.bfloat16, [37]),
        ("falcon", torch.float32, [17]),
        ("odd", torch.float32, [1, 2, 5, 17]),  # whose gradients one rounding of the readable model hardly errs in
    ],
)
def test_it_passes_the_check(size: str, dtype: torch.dtype, lengths: list[int]) -> None:
    weights = draw_model(SIZES[size], 0).to(dtype)
    report = check(target("compiled", weights), weights, lengths=lengths, progress=False)
    assert report.passed and report.first is None, table(report.rows)


def test_a_run_says_so() -> None:
    assert run(tiny(), torch.tensor([[1, 2, 3]]), backend="compiled").backend == "compiled"


# -- memory -----------------------------------------------------------------------------------------------------------


def test_one_loop_is_compiled_for_each_type() -> None:
    """Other strides or empty arguments do not make LLVM begin again, which takes seconds."""
    generate(tiny(), torch.tensor([[1, 2, 3]]), 3, Scale(at.resid_post(layer=0), 0.9), backend="compiled")
    loops = (kernels.scan, kernels.scan_backward, kernels.conv, kernels.conv_backward)
    for kernel in (*loops, token_kernels.step, token_kernels.add_norm):
        assert len(kernel.signatures) <= 2


def test_the_graph_holds_its_inputs_and_the_starts_of_chunks() -> None:
    l, held = 256, {}

    def pack(t: Tensor) -> Tensor:
        held[t.untyped_storage().data_ptr()] = t
        return t

    mine = leaves(inputs(l))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = scan(*mine, keep=[3])
    own = {t.untyped_storage().data_ptr() for t in mine}
    more = sum(t.numel() for where, t in held.items() if where not in own)
    assert out[0].requires_grad and more <= (l // 32 + 1) * b * e * n + mine[2].numel() + 1
    with torch.no_grad():
        assert not scan(*mine)[0].requires_grad

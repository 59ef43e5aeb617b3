"""The compiled mixer and the compiled carry against `Mixer.forward` line by line and the scan as it is written."""

from typing import Any

import pytest
import torch
from helpers import LAST, draw, near, tiny
from torch import Tensor

from interp import Scale, at, generate, run
from kernels_bridge import resolve
from kernels_bridge.carry import carry
from kernels_bridge.threads import free
from minimal_mamba.block import Memory, Mixer
from minimal_mamba.scan import READABLE, selective_scan
from minimal_mamba.tap import NO_TAP

pytest.importorskip("numba", reason="the compiled backend needs numba")
import numpy as np

from kernels_bridge.compiled import functions, kernels, loop, mixer, mixer_kernels
from kernels_bridge.compiled.carry import carry as compiled_carry

LENGTHS = (1, 2, 3, 7, 63, 500)


def memory_of(m: Mixer, b: int) -> Memory:
    (e, n), k = m.A_log.shape, m.conv1d.weight.shape[2]
    return draw(b, e, n, seed=1), draw(b, e, k, seed=2)


# -- softplus ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "exact"), [(np.float32, np.float64), (np.float64, np.longdouble)])
def test_softplus_is_within_four_units_in_the_last_place(dtype: type, exact: type) -> None:
    """Beyond 20, where torch gives x itself, of which exp(-x) is missing: 2e-9."""
    if exact is np.longdouble and np.finfo(np.longdouble).nmant <= 52:
        pytest.skip("no type wider than float64 here")
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [rng.uniform(-700, 20, 500_000), rng.uniform(-20, 20, 500_000), np.exp(rng.uniform(-60, 0, 9_999))]
    )
    x = x[x > np.log(np.finfo(dtype).tiny) + 1].astype(dtype)
    got = np.empty_like(x)
    functions.softplus(functions.NUMBERS[x.dtype], x, got)
    want = np.log1p(np.exp(-np.abs(x.astype(exact)))) + np.maximum(x.astype(exact), 0)
    assert (np.abs(got.astype(exact) - want) / np.spacing(want.astype(dtype)).astype(exact)).max() <= 4


def test_softplus_at_the_ends() -> None:
    x = torch.tensor([0.0, 20.0, 20.5, 1e30, -1e30, float("inf"), -float("inf"), float("nan")], dtype=torch.float64)
    got = np.empty_like(x.numpy())
    functions.softplus(functions.NUMBERS[got.dtype], x.numpy(), got)
    torch.testing.assert_close(
        torch.from_numpy(got), torch.nn.functional.softplus(x), equal_nan=True, rtol=1e-15, atol=0
    )


# -- the mixer --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def line_by_line(m: Mixer, x: Tensor, memory: Memory, mask: Tensor | None) -> tuple[Tensor, Memory]:
    return m(x, memory, mask, NO_TAP, READABLE)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("l", LENGTHS)
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_it_is_the_mixer(l: int, padded: bool) -> None:
    m, b = tiny(n_layer=1).backbone.layers[0].mixer, 5
    x, memory = draw(b, l, m.in_proj.in_features, seed=3), memory_of(m, b)
    before = [t.clone() for t in (x, *memory)]
    sizes = torch.tensor([l, max(1, l - 2), 1, l // 2 + 1, l]) if padded else torch.full((b,), l)
    mask = torch.arange(l) < sizes[:, None] if padded else None
    want, (h, window) = line_by_line(m, x, memory, mask)
    found, after = mixer.block(m, x, memory, mask, NO_TAP)
    real = torch.arange(l) < sizes[:, None]
    near(found[real], want[real])
    near(after[0], h)
    near(after[1], window, 1e-15)
    assert found.isfinite().all()  # on padding too
    last, after = mixer.block(m, x, memory, mask, LAST)
    near(last[:, 0], want[torch.arange(b), sizes - 1])
    near(after[0], h)
    near(after[1], window, 1e-15)
    for keep in (False, True):
        found, after = mixer.block(m, x, memory, mask, LAST if keep else NO_TAP, keep=False)
        assert all(part.isnan().all() for part in after)  # not asked for
        near(found[:, 0] if keep else found[real], last[:, 0] if keep else want[real])
    assert all(torch.equal(t, old) for t, old in zip((x, *memory), before, strict=True))


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("sizes", [
    {"bias": True}, {"conv_bias": False}, {"d_conv": 1}, {"d_conv": 2}, {"d_conv": 7}, {"d_state": 1}, {"d_state": 40},
    {"expand": 1}, {"dt_rank": 1}, {"d_model": 130}, {"mixer_rms_eps": 0.3}, {"mixer_rms_eps": 1e-6, "d_state": 1},
], ids=str)  # fmt: skip
@torch.no_grad()
def test_every_size_and_bias(sizes: dict[str, Any]) -> None:
    m, b = tiny(n_layer=1, **sizes).backbone.layers[0].mixer, 4
    mask = torch.arange(9) < torch.tensor([[9], [2], [5], [8]])
    x, memory = draw(b, 9, m.in_proj.in_features, seed=3), memory_of(m, b)
    want, (h, window) = line_by_line(m, x, memory, mask)
    for last_only in (False, True):
        found, after = mixer.block(m, x, memory, mask, LAST if last_only else NO_TAP)
        near(found[:, 0], want[torch.arange(b), mask.sum(1) - 1]) if last_only else near(found[mask], want[mask])
        near(after[0], h)
        near(after[1], window, 1e-15)


@torch.no_grad()
def test_strides_do_not_matter() -> None:
    m = tiny(n_layer=1).backbone.layers[0].mixer
    x, memory = draw(3, 11, m.in_proj.in_features), memory_of(m, 3)
    want = mixer.block(m, x, memory, None, NO_TAP)[0]
    odd = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, *memory)]
    assert torch.equal(mixer.block(m, odd[0], (odd[1], odd[2]), None, NO_TAP)[0], want)
    assert torch.equal(mixer.block(m, x, (memory[0].expand(3, -1, -1), memory[1]), None, NO_TAP)[0], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@torch.no_grad()
def test_what_is_not_a_number_goes_where_it_goes_in_torch(value: float, dtype: torch.dtype) -> None:
    m = tiny(n_layer=1, dtype=dtype).backbone.layers[0].mixer
    x, memory = draw(3, 9, m.in_proj.in_features).to(dtype), memory_of(m, 3)
    memory = memory[0].to(dtype), memory[1].to(dtype)
    x[1, 4, 2] = value
    want, (h, _) = line_by_line(m, x, memory, None)
    found, (after, _) = mixer.block(m, x, memory, None, NO_TAP)
    for got, other in ((found, want), (after, h)):
        torch.testing.assert_close(got, other, equal_nan=True, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_float32_errs_as_the_mixer_does() -> None:
    m = tiny(n_layer=1, d_model=64, d_state=16).backbone.layers[0].mixer
    x, memory = draw(4, 300, 64), memory_of(m, 4)
    want, _ = line_by_line(m, x, memory, None)
    m, x, memory = m.float(), x.float(), (memory[0].float(), memory[1].float())
    plain, found = line_by_line(m, x, memory, None)[0], mixer.block(m, x, memory, None, NO_TAP)[0]
    error = [float((y.double() - want).norm() / want.norm()) for y in (found, plain)]
    assert error[0] <= 2 * error[1] < 1e-5


@torch.no_grad()
def test_threads_share_the_pieces(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    m = tiny(n_layer=1, d_model=200, d_state=16).backbone.layers[0].mixer
    x, memory = draw(4, 90, 200), memory_of(m, 4)
    monkeypatch.setattr(mixer, "FEWEST", 50)
    monkeypatch.setattr(mixer, "CACHE", 1)
    want = mixer.block(m, x, memory, None, NO_TAP)[0]
    cut, plain = list[list[int]](), mixer.run
    monkeypatch.setattr(mixer, "run", lambda kernel, items, *a: (cut[-1].append(free()), plain(kernel, items, *a)))
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        cut.append([])
        near(mixer.block(m, x, memory, None, NO_TAP)[0], want, 1e-14)
    assert [{*loops} for loops in cut] == [{1}, {1}, {3}]  # 4 rows: of two threads each takes its own, of three none
    assert mixer.piece(4, 90, 400, 3) == (3 * 50 // 90, 90) and free() == 3


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_it_records_states(padded: bool, calls: list[tuple[int, ...]]) -> None:
    """As line by line, at positions of one's own for each site; the other sites inside make it go line by line."""
    model = tiny(n_layer=2, d_state=16, d_model=24)
    ids = torch.randint(0, 29, (3, 63), generator=torch.Generator().manual_seed(0))
    lengths = [63, 20, 41] if padded else None
    every = [at.ssm_state(layer=slice(None), pos=slice(None)), at.ssm_state(layer=1, pos=-1, e=[3, 40], n=2),
             at.state_read(layer=0, pos=[0, 5, 17]), at.resid_post(layer=0)]  # fmt: skip
    found = run(model, ids, record=every, lengths=lengths, backend="compiled", keep_state=True)
    assert len(calls) == 2
    want = run(model, ids, record=every, lengths=lengths, backend="reference", keep_state=True)
    for place in every:
        torch.testing.assert_close(found[place], want[place], rtol=1e-11, atol=1e-12, equal_nan=True)
    for x, y in zip(found.state.ssm_state, want.state.ssm_state, strict=True):
        near(x, y, 1e-11)
    run(model, ids, record=[at.dt(layer=0), at.ssm_state(layer=1)], backend="compiled")
    assert len(calls) == 3


# -- where it runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of each input of the block."""
    made: list[tuple[int, ...]] = []
    plain = mixer.block
    monkeypatch.setattr(mixer, "block", lambda m, x, *a, **k: made.append(tuple(x.shape)) or plain(m, x, *a, **k))
    return made


def test_it_runs_where_nothing_is_touched_and_no_gradient_is_wanted(calls: list[tuple[int, ...]]) -> None:
    model, ids = tiny(), torch.randint(0, 29, (2, 6), generator=torch.Generator().manual_seed(0))
    n = model.config.n_layer
    want = run(model, ids, backend="reference").logits.detach()
    assert run(model.eval(), ids, backend="compiled").logits.requires_grad and not calls
    with torch.no_grad():
        near(run(model, ids, backend="compiled").logits, want, 1e-11)
        assert len(calls) == n
        for inside, layers in ((at.u(layer=1), n - 1), (at.resid_post(), n), (at.ssm_state(layer=[0, 2]), n - 2)):
            calls.clear()
            edited = run(model, ids, Scale(inside, 1.5), record=inside, backend="compiled", keep_state=True)
            near(edited.logits, run(model, ids, Scale(inside, 1.5), backend="reference").logits, 1e-11)
            assert len(calls) == layers
        calls.clear()
        run(tiny(dtype=torch.bfloat16), ids, backend="compiled")
        assert not calls  # no loop of that type


@pytest.mark.parametrize("l", [1, 7, 63])
@torch.no_grad()
def test_the_model_agrees_padded_and_carried(l: int) -> None:
    model, found = tiny(), []
    ids = torch.randint(0, 29, (2, l), generator=torch.Generator().manual_seed(l))
    for backend in ("compiled", "reference"):
        ops = resolve(backend)
        before = model(ids.flip(1), keep_state=True, ops=ops).state
        out = model(ids, state=before, lengths=[l, max(1, l - 2)], keep_state=True, ops=ops)
        found.append([out.logits, *out.state.ssm_state, *out.state.conv_state])
    for x, y in zip(*found, strict=True):
        near(x, y, 1e-11)


def test_a_loop_is_compiled_once_for_each_type() -> None:
    """Other strides do not make LLVM begin again; runs after the others in this file."""
    for kernel in (mixer_kernels.conv, mixer_kernels.recurrence, mixer_kernels.carry, kernels.scan):
        assert len(kernel.signatures) <= 2


# -- carry ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [carry, compiled_carry], ids=["plain", "compiled"])
@pytest.mark.parametrize(("e", "n", "l", "count"), [(5, 3, 11, 8), (300, 16, 11, 8), (40, 130, 11, 8), (5, 3, 70, 60)])
def test_a_change_is_carried_on_as_the_scan_would(way: Any, e: int, n: int, l: int, count: int) -> None:
    """The readable scan of nothing, from the change; rows and changes begin where they like, some beyond the end."""
    k, b = 4, 3
    delta, A = draw(k, b, e, n), -draw(e, n, seed=1).exp()
    dt, gate, C = draw(b, l, e, seed=2).abs(), draw(b, l, e, seed=3), draw(b, l, n, seed=4)
    first = torch.tensor([[0, 2, 1], [3, 3, 3], [7, 10, 5], [l, 4, 9]])
    found = way(delta, first, count, dt, A, C, gate)
    assert found.shape == (k, b, count, e) and found.isfinite().all()
    beyond = first[..., None] + torch.arange(count) >= l
    assert way is carry or not found[beyond].any()
    for j in range(k):
        for r in range(b):
            s, row = slice(int(first[j, r]), min(l, int(first[j, r]) + count)), slice(r, r + 1)
            if s.start < l:
                zero = torch.zeros_like(dt[row, s])
                y, _ = selective_scan(zero, dt[row, s], A, torch.zeros_like(C[row, s]), C[row, s], delta[j, row])
                near(found[j, row, : s.stop - s.start], y * gate[row, s])
    assert found[:, :, 0].norm() > 0.1


def test_the_two_agree_in_float32_also_from_weights_of_16_bits() -> None:
    k, b, l, e, n = 3, 2, 20, 9, 4
    delta, A, dt = draw(k, b, e, n).float(), -draw(e, n).exp().float(), draw(b, l, e, seed=2).abs().float()
    C, gate, first = draw(b, l, n, seed=4).bfloat16(), draw(b, l, e, seed=3).float(), torch.tensor([[0, 5]] * k)
    one, two = (way(delta, first, 15, dt, A, C, gate) for way in (carry, compiled_carry))
    near(one, two, 1e-6)


# -- what the loops do not take as it is ------------------------------------------------------------------------------


def test_under_autocast_a_touched_layer_is_as_precise_as_an_untouched_one() -> None:
    """Else an edit that changes nothing would seem to do something."""
    small, ids = tiny(seed=3).float(), torch.tensor([[1, 2, 3, 4, 5]])
    nothing = Scale(at.u(layer=0, pos=3), 1.0)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        clean, touched = (run(small, ids, edits, backend="compiled") for edits in ([], [nothing]))
        steps = [generate(small, ids, 4, edits, backend="compiled").logits for edits in ([], [nothing])]
        plain = run(small, ids, backend="torch")
    assert torch.equal(clean.logits, touched.logits) and torch.equal(*steps)
    assert (clean.logits - plain.logits).norm() <= 2e-2 * plain.logits.norm()
    with torch.no_grad():
        assert (run(small, ids, backend="compiled").logits - clean.logits).norm() > 1e-4 * plain.logits.norm()


def test_a_bias_that_is_wider_than_the_model() -> None:
    small, ids = tiny(seed=3).float(), torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        want = run(small, ids, backend="reference").logits
        for layer in small.backbone.layers:
            layer.mixer.dt_proj.bias = torch.nn.Parameter(layer.mixer.dt_proj.bias.double())
        got = run(small, ids, backend="compiled").logits
    near(got, want, 1e-5)


def test_arrays_of_two_types_are_refused() -> None:
    """The loops' numbers are those of one type; with another's the exponentials would be nonsense."""
    x = draw(2, 3)
    with pytest.raises(TypeError, match="float32, float64; all must have one type"):
        loop.run(mixer_kernels.conv, 2, 6, x, x.float())


def test_a_state_is_contiguous_and_a_recording_its_own() -> None:
    """As on the other backends; in inference mode too, where a view does not say that it is one."""
    model, ids = tiny(seed=3), torch.tensor([[1, 2, 3, 4, 5]])
    records = [at.ssm_state(layer=1), at.state_read(layer=1), at.ssm_state(layer=1, pos=[0, 1, 2, 3, 4])]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = run(model, ids, record=records, backend="compiled", keep_state=True)
            assert all(x.is_contiguous() for x in (*out.state.ssm_state, *out.state.conv_state))
            assert len({value.untyped_storage().data_ptr() for value in out.records.values()}) == 3

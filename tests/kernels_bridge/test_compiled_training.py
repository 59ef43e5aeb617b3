"""The compiled mixer's gradients, against autograd through `Mixer.forward` line by line."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import LAST, draw, near, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from interp import Scale, at, run
from kernels_bridge import resolve
from minimal_mamba.block import Memory, Mixer
from minimal_mamba.scan import READABLE
from minimal_mamba.tap import NO_TAP, Tap

pytest.importorskip("numba", reason="the compiled backend needs numba")

from kernels_bridge.compiled import backward_kernels, kernels, mixer, mixer_backward, mixer_kernels

LENGTHS = (1, 2, 3, 7, 63, 200)


def blank(m: Mixer, x: Tensor) -> Memory:
    (e, n), k = m.A_log.shape, m.conv1d.weight.shape[2]
    return x.new_zeros(len(x), e, n), x.new_zeros(len(x), e, k)


def both(m: Mixer, x: Tensor, mask: Tensor | None = None, tap: Tap = NO_TAP) -> list[dict[str, Tensor]]:
    """The result on tokens and all gradients of its product with the same numbers: compiled, and line by line."""
    (b, l, _), memory = x.shape, blank(m, x)
    real = torch.ones(b, l, dtype=torch.bool) if mask is None else mask
    found = []
    for compiled in (True, False):
        given = x.clone().requires_grad_()
        if compiled:
            out = mixer.block(m, given, memory, mask, tap, keep=False)[0]
        else:
            out = m(given, memory, mask, NO_TAP, READABLE)[0]
            out = out[torch.arange(b), real.sum(1) - 1][:, None] if tap.last_only else out
        some = out[:, 0] if tap.last_only else out[real]
        leaves = {"x": given} | {name: p for name, p in m.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad((some * draw(*some.shape, seed=9).to(x.dtype)).sum(), [*leaves.values()])
        found.append({"out": some.detach()} | dict(zip(leaves, grads, strict=True)))
    return found


def agree(found: list[dict[str, Tensor]], tol: float = 1e-11) -> None:
    one, two = found
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert two[name].norm() > 0 or (name == "A_log" and two["x"].shape[1] == 1), name  # nothing to forget yet
        near(value, two[name], tol)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("l", LENGTHS)
@pytest.mark.parametrize("padded", [False, True])
def test_the_gradients_are_the_mixers(l: int, padded: bool) -> None:
    m, b = tiny(n_layer=1).backbone.layers[0].mixer, 5
    sizes = torch.tensor([l, max(1, l - 2), 1, l // 2 + 1, l])
    agree(both(m, draw(b, l, m.in_proj.in_features, seed=3), torch.arange(l) < sizes[:, None] if padded else None))


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("sizes", [
    {"bias": True}, {"conv_bias": False}, {"d_conv": 1}, {"d_conv": 2}, {"d_conv": 7}, {"d_state": 1}, {"d_state": 40},
    {"expand": 1}, {"dt_rank": 1}, {"d_model": 130}, {"mixer_rms_eps": 0.3}, {"mixer_rms_eps": 1e-6, "d_state": 1},
], ids=str)  # fmt: skip
def test_every_size_and_bias(sizes: dict[str, Any]) -> None:
    m = tiny(n_layer=1, **sizes).backbone.layers[0].mixer
    x, mask = draw(4, 9, m.in_proj.in_features, seed=3), torch.arange(9) < torch.tensor([[9], [2], [5], [8]])
    agree(both(m, x, mask))
    agree(both(m, x, mask, LAST))
    agree(both(m, x.transpose(0, 1).contiguous().transpose(0, 1)))


def test_a_step_beyond_twenty_is_its_input_in_the_backward_too() -> None:
    """As torch has softplus and its derivative; 1 / (1 + exp(-20.1)) is 2e-9 less than 1."""
    m = tiny(n_layer=1).backbone.layers[0].mixer
    with torch.no_grad():
        m.dt_proj.weight.mul_(0.01)
        m.dt_proj.bias.fill_(20.1)
    agree(both(m, draw(4, 9, m.in_proj.in_features, seed=3)))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that nobody has written holds NaN."""
    plain = mixer.space
    for module in (mixer, mixer_backward):
        monkeypatch.setattr(module, "space", lambda *a: plain(*a).fill_(torch.nan))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills new memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("poisoned", "cut")
@pytest.mark.parametrize("on_padding", [0.0, 1.0, float("nan")])
def test_padding_takes_no_gradient_and_gives_none(on_padding: float) -> None:
    """Whatever comes back from it, and whatever lies in memory there; over several chunks."""
    m, sizes = tiny(n_layer=1, bias=True).backbone.layers[0].mixer, torch.tensor([90, 3, 1, 40])
    real = torch.arange(90) < sizes[:, None]
    x, dout = draw(4, 90, 12).requires_grad_(), draw(4, 90, 12, seed=9)
    leaves = [x, *m.parameters()]
    out = _Block(m, real)(x)
    found = torch.autograd.grad(out, leaves, torch.where(real[..., None], dout, torch.full_like(dout, on_padding)))
    line = m(x, blank(m, x), real, NO_TAP, READABLE)[0]
    for got, want in zip(found, torch.autograd.grad((line * dout)[real].sum(), leaves), strict=True):
        near(got, want, 1e-11)
    assert not found[0][~real].any()


def test_finite_differences() -> None:
    m = tiny(n_layer=1, d_model=4, d_state=3, dt_rank=2).backbone.layers[0].mixer
    sizes = torch.tensor([5, 3])
    names = [name for name, _ in m.named_parameters()]
    real = torch.arange(5) < sizes[:, None]

    def out(x: Tensor, *values: Tensor) -> Tensor:
        made: Tensor = torch.func.functional_call(
            _Block(m, real), dict(zip((f"m.{name}" for name in names), values, strict=True)), (x,)
        )
        return made[real]

    given = [draw(2, 5, 4), *(p.detach().clone() for p in m.parameters())]
    assert torch.autograd.gradcheck(out, [x.requires_grad_() for x in given], fast_mode=True)


class _Block(nn.Module):
    """The compiled mixer as a module, for `functional_call`."""

    def __init__(self, m: Mixer, mask: Tensor):
        super().__init__()
        self.m, self.mask = m, mask

    def forward(self, x: Tensor) -> Tensor:
        return mixer.block(self.m, x, blank(self.m, x), self.mask, NO_TAP, keep=False)[0]


def test_float32_errs_as_the_mixer_does() -> None:
    m, x = tiny(n_layer=1, d_model=64, d_state=16).backbone.layers[0].mixer, draw(4, 300, 64)
    exact = both(m, x)[1]
    one, two = both(m.float(), x.float())
    for name, want in exact.items():
        error = [float((found[name].double() - want).norm() / want.norm()) for found in (one, two)]
        assert error[0] <= max(2 * error[1], 1e-6) and error[0] < 1e-5, name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_is_not_a_number_reaches_its_row_alone(value: float) -> None:
    m, x = tiny(n_layer=1).backbone.layers[0].mixer, draw(3, 9, 12)
    clean = both(m, x)[0]["x"]
    x[1, 4, 2] = value
    one, two = both(m, x)
    assert torch.equal(one["x"][[0, 2]], clean[[0, 2]])
    assert torch.equal(one["x"][1].isfinite().all(), two["x"][1].isfinite().all())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_threads_share_the_rows(count: int) -> None:
    torch.set_num_threads(count)
    m = tiny(n_layer=1, d_model=200, d_state=16).backbone.layers[0].mixer
    agree(both(m, draw(4, 90, 200)))


def test_a_backward_can_be_repeated() -> None:
    model, ids = tiny(n_layer=2).train(), torch.randint(0, 29, (2, 6), generator=torch.Generator().manual_seed(0))
    total = model(ids, ops=resolve("compiled")).logits.square().sum()
    one, two = (torch.autograd.grad(total, [*model.parameters()], retain_graph=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


def test_weights_that_are_not_trained_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    m, x = tiny(n_layer=1, bias=True).backbone.layers[0].mixer, draw(3, 9, 12)
    want = both(m, x)[1]
    for name, p in m.named_parameters():
        p.requires_grad_(name in ("dt_proj.weight", "A_log"))
    made, plain = list[str](), mixer_backward._add
    monkeypatch.setattr(mixer_backward, "_add", lambda sums, *a: (made.extend(sums), plain(sums, *a)))
    found = both(m, x)[0]
    assert {*made} == {"dt_proj"} and found.keys() == {"out", "x", "dt_proj.weight", "A_log"}
    for name, value in found.items():
        near(value, want[name], 1e-11)


# -- in a model -------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One for each mixer that ran so."""
    made: list[int] = []
    plain = mixer_backward.learn
    monkeypatch.setattr(mixer_backward, "learn", lambda *a: made.append(1) or plain(*a))
    return made


def test_it_runs_in_training_where_nothing_inside_is_touched(calls: list[int]) -> None:
    model, ids = tiny(n_layer=3).train(), torch.randint(0, 29, (2, 6), generator=torch.Generator().manual_seed(0))
    grads = []
    for backend in ("reference", "compiled"):
        out = run(model, ids, Scale(at.u(layer=1), 1.5), backend=backend)
        grads.append(torch.autograd.grad(out.logits.square().sum(), [*model.parameters()]))
    assert len(calls) == 2  # of three layers one has the edit
    for x, y in zip(*grads, strict=True):
        near(y, x, 1e-11)
    for how in (
        lambda: run(model, ids, backend="compiled", keep_state=True),
        lambda: run(model, ids, backend="compiled", state=run(model, ids, keep_state=True).state),
        lambda: run(model.eval(), ids, backend="compiled"),
    ):
        calls.clear()
        assert how().logits.requires_grad and not calls
    model.train()
    with torch.no_grad():
        run(model, ids, backend="compiled")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(model, ids, backend="compiled")
    run(tiny(dtype=torch.bfloat16).train(), ids, backend="compiled")
    assert not calls


def test_training_steps_follow_the_readable_models(calls: list[int]) -> None:
    """Padded batches, and weights that change between a forward and the next."""
    ids, found = torch.randint(0, 29, (8, 20), generator=torch.Generator().manual_seed(0)), []
    for backend in ("reference", "compiled"):
        model, losses = tiny(n_layer=2, seed=1).train(), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(6):
            logits = model(ids, lengths=[20, 3, 20, 7, 1, 20, 12, 5], ops=resolve(backend)).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        found.append(torch.stack(losses))
    near(found[1], found[0], 1e-9)
    assert found[0][-1] < found[0][0] - 0.1 and len(calls) == 12


def test_a_loop_is_compiled_once_for_each_type() -> None:
    """Other strides do not make LLVM begin again; runs after the others in this file."""
    loops = backward_kernels.gate, backward_kernels.step_sizes, backward_kernels.step_sizes_and_skip
    for kernel in (*loops, backward_kernels.conv, kernels.scan_backward, mixer_kernels.recurrence):
        assert len(kernel.signatures) <= 2

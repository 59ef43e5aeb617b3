"""The blocked scan against a plain loop in float64: outputs, states, every gradient, types, memory."""

import pytest
import torch
from helpers import tiny
from plain_scan import LENGTHS, b, e, inputs, leaves, loop, n, near
from torch import Tensor

from kernels_bridge import resolve, torch_scan
from kernels_bridge.torch_scan import scan

NAMES = ("u", "dt", "A", "B", "C", "h")


@pytest.fixture(params=["one block", "ragged blocks", "one token, one channel"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Blocks as they are, 3 tokens of 2 channels (5 = 2 + 2 + 1) of each row, and the smallest."""
    if request.param == "ragged blocks":
        monkeypatch.setattr(torch_scan, "BLOCK", 20)
        monkeypatch.setattr(torch_scan, "TOKENS", 3)
        assert torch_scan.cut(b, 500, e, n) == (1, 3, 2)
    if request.param == "one token, one channel":
        monkeypatch.setattr(torch_scan, "BLOCK", 1)
        assert torch_scan.cut(b, 500, e, n) == (1, 1, 1)
    return request.param


@pytest.mark.parametrize("l", LENGTHS)
@pytest.mark.parametrize("extras", ["plain", "kept and added"])
def test_outputs_and_every_gradient(l: int, extras: str, blocks: str) -> None:
    keep: list[int] = []
    added_at: list[int] = []
    added = None
    ours = leaves(inputs(l))
    theirs = leaves(ours)
    if extras != "plain":
        keep = sorted({0, l // 3, l // 2, l - 1})
        added_at = sorted({0, l // 2, l // 2 + (l > 2), l - 1})
        g = torch.Generator().manual_seed(5)
        added = torch.randn((b, len(added_at), e, n), generator=g, dtype=torch.float64)
        ours, theirs = [*ours, *leaves([added])], [*theirs, *leaves([added])]
    got = scan(*ours[:6], keep=keep, added=ours[6] if added is not None else None, added_at=added_at)
    want = loop(*theirs[:6], keep=keep, added=theirs[6] if added is not None else None, added_at=added_at)
    g = torch.Generator().manual_seed(6)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in want]
    for x, y in zip(got, want, strict=True):
        near(x, y)
    some = 3 if keep else 2  # no kept states, nothing to differentiate
    grads = torch.autograd.grad(got[:some], ours, weights[:some])
    wanted = torch.autograd.grad(want[:some], theirs, weights[:some])
    for x, y in zip(grads, wanted, strict=True):
        near(x, y)


@pytest.mark.parametrize("output", [0, 1, 2], ids=["y", "last state", "kept states"])
def test_each_output_has_its_own_gradient(output: int, blocks: str) -> None:
    """A kernel that forgets one (the official one forgets the last state's) is caught: none of them is small."""
    ours = leaves(inputs(7, mean_dt=0.1))
    theirs = leaves(ours)
    got, want = scan(*ours, keep=[1, 5])[output], loop(*theirs, keep=[1, 5])[output]
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    grads = torch.autograd.grad((got * weight).sum(), ours)
    wanted = torch.autograd.grad((want * weight).sum(), theirs, allow_unused=True)
    for name, x, y in zip(NAMES, grads, wanted, strict=True):
        if name == "C" and output > 0:  # states do not depend on C
            assert y is None and x.eq(0).all()
            continue
        assert y.norm() > 0.1, name
        near(x, y)


def test_gradcheck(blocks: str) -> None:
    """The derivative itself, by finite differences: no faith in the loop's autograd either."""
    ours = leaves(inputs(5))
    added = leaves([torch.randn((b, 2, e, n), generator=torch.Generator().manual_seed(8), dtype=torch.float64)])[0]

    def fn(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return scan(*args[:6], keep=[0, 3], added=args[6], added_at=[1, 4])

    assert torch.autograd.gradcheck(fn, (*ours, added), fast_mode=True)


def test_gradcheck_in_full() -> None:
    small = [t[..., : min(2, t.shape[-1])] for t in inputs(3)]
    small[2], small[5] = small[2][:2], small[5][:, :2]
    assert torch.autograd.gradcheck(lambda *a: scan(*a, keep=[1]), leaves(small))


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (3,), (4,), (5,), (0, 5), (2, 3)])
def test_any_subset_of_the_inputs_may_need_a_gradient(which: tuple[int, ...]) -> None:
    ours, theirs = inputs(7), inputs(7)
    for i in which:
        ours[i].requires_grad_(), theirs[i].requires_grad_()
    got = torch.autograd.grad(scan(*ours)[0].square().sum(), [ours[i] for i in which])
    want = torch.autograd.grad(loop(*theirs)[0].square().sum(), [theirs[i] for i in which])
    for x, y in zip(got, want, strict=True):
        near(x, y)


def strided(t: Tensor) -> Tensor:
    """The same values, no axis contiguous."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
    wide[..., ::2] = t
    return wide.transpose(0, -1).contiguous().transpose(0, -1)[..., ::2]


def test_strides_do_not_matter(blocks: str) -> None:
    plain = inputs(7)
    odd = [strided(t) for t in plain]
    assert not any(t.is_contiguous() for t in odd)
    plain, odd = [t.requires_grad_() for t in plain], [t.requires_grad_() for t in odd]
    want, got = scan(*plain, keep=[2, 6]), scan(*odd, keep=[2, 6])
    for x, y in zip(got, want, strict=True):
        near(x, y, 1e-14)
    # the gradient of a sum arrives with stride 0, that of a transpose with strides of its own
    for how in (lambda y: y.sum(), lambda y: (y.transpose(0, 1).contiguous() * torch.arange(7.0)[:, None, None]).sum()):
        ones = torch.autograd.grad(how(got[0]) + got[1].sum(), odd, retain_graph=True)
        others = torch.autograd.grad(how(want[0]) + want[1].sum(), plain, retain_graph=True)
        for x, y in zip(ones, others, strict=True):
            near(x, y, 1e-13)


def test_the_inputs_are_left_as_they_are() -> None:
    ours = inputs(9)
    before = [t.clone() for t in ours]
    y, last, kept = scan(*leaves(ours), keep=[3])
    (y.sum() + last.sum() + kept.sum()).backward()
    _, last, kept = scan(*ours, keep=[3, 8])
    last += 1.0  # an output is a value of its own, though its state was kept too
    assert not torch.equal(last, kept[:, 1])
    assert all(torch.equal(x, y) for x, y in zip(ours, before, strict=True))


# Measured over these: outputs up to 6e-7, gradients up to 4e-7, both at the smallest step, whose memory is longest.
@pytest.mark.parametrize("mean_dt", [0.01, 0.1, 0.5, 2.0])
def test_float32_keeps_its_digits_at_every_step_size(mean_dt: float) -> None:
    """Scans in log space overflow here; products of decays formed forward do not."""
    exact = leaves(inputs(500, mean_dt))
    single = leaves([t.float() for t in exact])
    want, got = loop(*exact, keep=[100, 499]), scan(*single, keep=[100, 499])
    for x, y in zip(got, want, strict=True):
        near(x.double(), y, 2e-6)
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(6)).double() for x in want]
    wanted = torch.autograd.grad(want, exact, weights)
    for x, y in zip(torch.autograd.grad(got, single, [w.float() for w in weights]), wanted, strict=True):
        near(x.double(), y, 2e-6)


def test_extreme_steps_are_finite() -> None:
    """A step so large that the decay is 0, and none at all: the state is overwritten, or stays to the bit."""
    u, _dt, A, B, C, h = leaves(inputs(6))
    steps = torch.tensor([0.0, 1e4, 0.0, 0.0, 1e4, 0.0], dtype=torch.float64)[None, :, None].expand(b, 6, e)
    y, last, kept = scan(u, steps.clone().requires_grad_(), A, B, C, h, keep=[0, 1, 3])
    assert torch.equal(kept[:, 0], h) and torch.equal(kept[:, 1], kept[:, 2])
    near(kept[:, 1].detach(), (1e4 * u[:, 1, :, None] * B[:, 1, None, :]).detach(), 1e-14)
    grads = torch.autograd.grad(y.sum() + last.sum(), (u, A, B, C, h))
    assert all(torch.isfinite(g).all() for g in grads)


def test_sixteen_bit_inputs_are_scanned_in_the_states_type() -> None:
    exact = inputs(63)
    half = [t.bfloat16() for t in exact]
    mixed = [half[0], exact[1].float(), exact[2].float(), half[3], half[4], exact[5].float()]
    y, last, _ = scan(*mixed)
    assert y.dtype == last.dtype == torch.float32
    want = loop(*(t.double() for t in mixed))
    near(y.double(), want[0], 1e-6)
    near(last.double(), want[1], 1e-6)


# -- memory -----------------------------------------------------------------------------------------------------------


def saved_by(call) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """What the graph of a call holds, each memory once."""
    held: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        held[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call()
    del out
    return list(held.values())


def test_the_graph_of_the_scan_holds_its_inputs_and_the_starts_of_blocks() -> None:
    l = 256
    ours = leaves(inputs(l))
    mine = {t.untyped_storage().data_ptr() for t in ours}
    saved = [t for t in saved_by(lambda: scan(*ours, keep=[3])) if t.untyped_storage().data_ptr() not in mine]
    blocks = -(-l // torch_scan.cut(b, l, e, n)[1])
    assert blocks == 4
    assert sum(t.numel() for t in saved) == blocks * b * e * n
    assert sum(t.numel() for t in saved_by(lambda: loop(*ours))) > b * l * e * n  # control: the loop holds every state


@pytest.mark.parametrize("sizes", [(8, 2048, 1536, 16), (64, 20, 192, 16), (2048, 64, 256, 128), (1, 4097, 5120, 16)])
def test_the_states_kept_for_the_backward_are_a_small_share_of_all(sizes: tuple[int, int, int, int]) -> None:
    rows, tokens, channels = torch_scan.cut(*sizes)
    assert tokens >= torch_scan.TOKENS >= 16
    assert rows * tokens * channels * sizes[3] <= torch_scan.BLOCK


def test_without_gradients_nothing_is_held() -> None:
    assert saved_by(lambda: scan(*inputs(64))) == []
    with torch.no_grad():
        assert not scan(*leaves(inputs(64)))[0].requires_grad


def test_no_graph_of_a_model_holds_a_state_per_token() -> None:
    model, l = tiny(), 256
    ids = torch.randint(0, 29, (2, l), generator=torch.Generator().manual_seed(0))
    states = 2 * l * model.config.d_inner * model.config.d_state
    saved = saved_by(lambda: model(ids, ops=resolve("torch")).logits)
    assert len(saved) > 20 and max(t.untyped_storage().nbytes() // 8 for t in saved) < states
    readable = saved_by(lambda: model(ids).logits)  # control: the readable model holds several a layer
    assert sum(t.numel() for t in readable) > 3 * states

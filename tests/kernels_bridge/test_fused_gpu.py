"""The fused backend on the real kernels: small cases of what `test_fused.py` and `tests/kernels` prove without them."""

from pathlib import Path

import pytest
import torch
from helpers import error, lively
from torch import Tensor

from interp import Scale, Set, at, generate, gradients, logit_diff, run
from kernels_bridge.harness.check import LENGTHS
from minimal_mamba import Mamba, MambaConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")]

CONFIG = MambaConfig(64, 2, 61, d_state=16)


def models(dtype: torch.dtype = torch.float32) -> tuple[Mamba, Mamba]:
    """One on the GPU, and the readable one in float64, with the same rounded weights."""
    ours = lively(Mamba(CONFIG).to(dtype)).cuda()
    exact = Mamba(CONFIG).double().cuda()
    exact.load_state_dict(ours.state_dict())
    return ours, exact


def draw_ids(b: int, l: int) -> Tensor:
    return torch.randint(0, 61, (b, l), generator=torch.Generator().manual_seed(l)).cuda()


@pytest.mark.parametrize("l", LENGTHS)
@torch.no_grad()
def test_every_length(l: int) -> None:
    """The block, and the scan with its virtual tokens; against `torch` in float64, which is held to the other."""
    ours, exact = models()
    want = run(exact, draw_ids(2, l), backend="torch", keep_state=True)
    for keep in (False, True):
        got = run(ours, draw_ids(2, l), backend="fused", keep_state=keep)
        assert got.backend == "fused" and error(got.logits, want.logits) < 2e-5
    for got_h, want_h in zip(got.state.ssm_state, want.state.ssm_state, strict=True):
        assert error(got_h, want_h) < 2e-5


def edits(l: int) -> list:
    h = torch.randn(1, 3, 128, 16, generator=torch.Generator().manual_seed(1))
    return [
        Set(at.ssm_state(layer=0, pos=[1, 5, l - 2]), h), Scale(at.ssm_state(layer=1, pos=[2, 9]), 0.5),
        Scale(at.state_read(layer=0, pos=7), 2.0), Scale(at.conv_state(layer=1, pos=4), 0.5),
        Scale(at.dt(layer=0), 0.9),
    ]  # fmt: skip


@pytest.mark.parametrize("l", [17, 129, 2049])
@torch.no_grad()
def test_under_edits(l: int) -> None:
    ours, exact = models()
    record = [at.ssm_state(pos=[3, 9]), at.state_write(layer=0, pos=4)]
    want, got = (
        run(m, draw_ids(2, l), edits(l), record, backend=b, lengths=[l, l - 1])
        for m, b in ((exact, "torch"), (ours, "fused"))
    )
    assert error(got.logits, want.logits) < 2e-5
    for address in record:
        assert error(got[address], want[address]) < 2e-5


@torch.no_grad()
def test_a_stretch_whose_rows_begin_anywhere() -> None:
    """128 tokens of 131, which the scan's kernel loads 16 bytes at once."""
    ours, exact = models()
    changes = [Scale(at.ssm_state(layer=1, pos=128), 0.5)]
    want, got = (run(m, draw_ids(2, 131), changes, backend=b).logits for m, b in ((exact, "torch"), (ours, "fused")))
    assert error(got, want) < 2e-5


@pytest.mark.parametrize("l", [5, 129, 513])
def test_gradients_are_whole(l: int) -> None:
    """Of every parameter, of the last state, of states at chosen positions."""
    ours, exact = models()
    found = []
    for m, b in ((exact, "torch"), (ours, "fused")):
        out = run(m, draw_ids(2, l), backend=b, keep_state=True)
        loss = out.logits.double().square().mean() + sum(h.double().square().mean() for h in out.state.ssm_state)
        block = run(m, draw_ids(2, l), backend=b).logits.double().square().mean()
        parts = [*torch.autograd.grad(loss, [*m.parameters()]), *torch.autograd.grad(block, [*m.parameters()])]
        answer = torch.tensor([3, 4], device="cuda"), torch.tensor([5, 6], device="cuda")
        places = [at.ssm_state(layer=0, pos=[0, l - 2]), at.state_write(layer=1)]
        made = gradients(m, draw_ids(2, l), lambda x, a=answer: logit_diff(x[:, -1], *a), places, backend=b)
        found.append([*parts, *(made[p] for p in places)])
    for want, got in zip(*found, strict=True):
        assert error(got, want) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_sixteen_bits(dtype: torch.dtype) -> None:
    ours, exact = models(dtype)
    for keep, changes in ((False, []), (True, []), (True, edits(129))):
        want = run(exact, draw_ids(4, 129), changes, backend="torch").logits
        plain = run(ours, draw_ids(4, 129), changes, backend="torch").logits
        got = run(ours, draw_ids(4, 129), changes, backend="fused", keep_state=keep).logits
        assert error(got, want) < 2 * error(plain, want) + 2e-3


def test_decoding_changes_no_carried_state() -> None:
    ours, exact = models()
    want, got = (
        generate(m, draw_ids(2, 9), 6, [Scale(at.ssm_state(layer=1, pos=10), 0.5)], backend=b)
        for m, b in ((exact, "torch"), (ours, "fused"))
    )
    assert torch.equal(want.ids, got.ids) and error(got.logits, want.logits) < 2e-5
    with torch.no_grad():
        state = run(ours, draw_ids(2, 5), backend="fused", keep_state=True).state
        kept = [t.clone() for t in (*state.ssm_state, *state.conv_state)]
        run(ours, draw_ids(2, 1), backend="fused", state=state)
    assert all(torch.equal(a, b) for a, b in zip(kept, (*state.ssm_state, *state.conv_state), strict=True))


@torch.no_grad()
def test_the_kernels_own_states() -> None:
    from kernels_bridge.fused import load

    _, exact = models()
    names = ("u", "dt", "B", "ssm_state")
    done = run(exact, draw_ids(2, 63), record=[getattr(at, s)(layer=0) for s in names], backend="torch")
    u, dt, B, h = (done[getattr(at, s)(layer=0)].float() for s in names)
    A = -torch.exp(exact.backbone.layers[0].mixer.A_log).float()
    assert error(load().states(u, dt, A, B), h) < 1e-5


def test_golden_vectors_can_be_recorded(tmp_path: Path) -> None:
    from kernels_bridge.fused import golden

    golden.record(tmp_path / "golden.safetensors")
    wrong = [(c.name, q, e) for c, q, e, bound in golden.replay(tmp_path / "golden.safetensors") if not e <= bound]
    assert not wrong, wrong

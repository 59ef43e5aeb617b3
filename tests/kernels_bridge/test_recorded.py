"""Every state recorded: the scans that write each into the recording itself, and that nobody else sees that memory."""

from typing import Any

import pytest
import torch
from helpers import tiny
from torch import Tensor

from interp import Scale, at, run
from kernels_bridge import resolve, torch_scan
from kernels_bridge.backends import BACKENDS
from minimal_mamba import Plan
from minimal_mamba.scan import READABLE, ssm_step

HERE = [name for name in ("torch", "compiled") if not BACKENDS[name].missing(torch.device("cpu"))]
FAST = pytest.mark.parametrize("backend", HERE)
MODEL = tiny(d_state=16)
LAYERS = MODEL.config.n_layer
ALL = at.ssm_state(layer=slice(None), pos=slice(None))


def draw_ids(b: int, l: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 29, (b, l), generator=torch.Generator().manual_seed(seed))


def near(got: Tensor, want: Tensor, rtol: float = 1e-12) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got - want).norm() <= rtol * want.norm(), f"off by {(got - want).norm() / want.norm():.1e}"


def loop(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> list[Tensor]:
    """y (b, l, e), the last state, every state (b, l, e, n), as they are written."""
    ys, states = [], []
    for t in range(u.shape[1]):
        h, y = ssm_step(h, u[:, t], dt[:, t], A, B[:, t], C[:, t])
        ys, states = [*ys, y], [*states, h]
    return [torch.stack(ys, 1), h, torch.stack(states, 1)]


@FAST
@pytest.mark.parametrize("n", [1, 5, 16, 19, 48])
@pytest.mark.parametrize("l", [1, 2, 37])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_scan_writes_every_state_where_it_is_told(backend: str, n: int, l: int, dtype: torch.dtype) -> None:
    if backend == "compiled":
        from kernels_bridge.compiled.scan import scan
    else:
        scan = torch_scan.scan
    g, e = torch.Generator().manual_seed(n), 21
    u, dt, A, B, C, h = (torch.randn(s, generator=g, dtype=torch.float64)
                         for s in ((2, l, e), (2, l, e), (e, n), (2, l, n), (2, l, n), (2, e, n)))  # fmt: skip
    made = [x.to(dtype) for x in (u, dt.abs(), -A.exp(), B, C, h)]
    want = loop(*(x.double() for x in made))
    room = torch.full((2, l, e, n), torch.nan, dtype=dtype)
    with torch.no_grad():
        found = scan(*made, keep=range(l), room=room)
        own = scan(*made, keep=range(l))
    with_grad = scan(*(x.requires_grad_() for x in made), keep=range(l))
    assert found[2].data_ptr() == room.data_ptr() != own[2].data_ptr()
    for several in (found, own, with_grad):
        for x, y in zip(several, want, strict=True):
            near(x.detach().double(), y, 1e-13 if dtype == torch.float64 else 1e-6)
    room.fill_(7.0)
    assert not (found[1] == 7.0).any()  # the last state is a value of its own


CASES: dict[str, dict[str, Any]] = {
    "one address": {},
    "a list": {"record": [at.ssm_state(layer=i) for i in range(LAYERS)]},
    "some layers, backwards": {"record": at.ssm_state(layer=[2, 0])},
    "twice, beside others": {"record": [ALL, at.ssm_state(layer=1), at.state_read(), at.ssm_state(layer=1, e=3)]},
    "what is read": {"record": [at.state_read()]},
    "what is read, elsewhere": {"record": [at.ssm_state(pos=[1, 5]), at.state_read(pos=[2, 5, 7])]},
    "edited elsewhere": {"edits": [Scale(at.u(layer=1, pos=3), 0.3), Scale(at.state_read(layer=0, pos=2), 0.5)]},
    "edited there": {"edits": [Scale(at.ssm_state(layer=1, pos=4), 0.3)]},
    "padded": {"lengths": [9, 4, 7]},
    "a part": {"record": [at.ssm_state(pos=slice(2, None)), at.ssm_state(pos=slice(None, None, 2))]},
    "in another order": {"record": [at.ssm_state(pos=[7, 2, 4])]},
    "carried": {"state": True},
}


@FAST
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("grad", [False, True])
def test_recordings_are_those_of_the_readable_model(backend: str, name: str, grad: bool) -> None:
    case = {"record": ALL} | CASES[name]
    ids = draw_ids(3, 9)
    with torch.set_grad_enabled(grad):
        state = run(MODEL, ids, keep_state=True, backend="reference").state if case.pop("state", None) else None
        got, want = (run(MODEL, ids, **case, state=state, backend=b, keep_state=True) for b in (backend, "reference"))
    near(got.logits, want.logits)
    assert got.records.keys() == want.records.keys()
    for address in got.records:
        assert torch.equal(got[address].isnan(), want[address].isnan())
        near(got[address].nan_to_num(), want[address].nan_to_num())
        assert got[address].requires_grad == grad
    for a, b in zip(got.state.ssm_state, want.state.ssm_state, strict=True):
        near(a, b)


@FAST
def test_a_recording_is_nobody_elses_memory(backend: str) -> None:
    """Nor that of another recording of the same run, of its state, or of the next run."""
    ids = draw_ids(2, 6)
    with torch.no_grad():
        out = run(MODEL, ids, record=[ALL, at.ssm_state(layer=1), at.ssm_state()], backend=backend, keep_state=True)
        want = out[ALL]
        state = [h.clone() for h in out.state.ssm_state]
        out.records[ALL].fill_(7.0)
        assert torch.equal(out[at.ssm_state(layer=1)], want[1])
        assert all(torch.equal(a, b) for a, b in zip(state, out.state.ssm_state, strict=True))
        again = run(MODEL, ids, record=[ALL], backend=backend)
    assert torch.equal(again[ALL], want)


@FAST
def test_all_layers_are_written_into_one_memory(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy: what is returned is what the scans wrote to."""
    handed: list[Tensor] = []
    place = Plan.place

    def kept(*args: Any) -> Tensor | None:
        found = place(*args)
        assert found is not None
        handed.append(found)
        return found

    monkeypatch.setattr(Plan, "place", kept)
    with torch.no_grad():
        out = run(MODEL, draw_ids(2, 6), record=ALL, backend=backend)
    assert [x.data_ptr() for x in handed] == [x.data_ptr() for x in out.records[ALL]] and len(handed) == LAYERS
    assert out.backend == backend and resolve(backend) is not READABLE

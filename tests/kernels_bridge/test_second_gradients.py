"""A backward that is written by hand has no gradient of its own: second gradients are refused, and never left out."""

from collections.abc import Callable

import pytest
import torch
from helpers import draw, tiny
from torch import Tensor
from torch.autograd.functional import hessian, jvp

from interp import Set, at, run
from kernels_bridge import BACKENDS
from minimal_mamba.errors import BackendUnavailable

MODEL = tiny()
IDS = torch.tensor([[3, 1, 4, 1, 5, 9]])
FAST = [name for name in ("torch", "compiled") if BACKENDS[name].available(torch.device("cpu"))]
PLACES = {
    "the last layer's dt": at.dt(layer=2, pos=2),  # behind which nothing but a scan is asked for a second gradient
    "a state": at.ssm_state(layer=1, pos=2),
    "the stream": at.resid_pre(layer=1, pos=2),
}


def output(name: str, backend: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    place = PLACES[name]
    there = run(MODEL, IDS, record=[place], backend="reference")[place].detach()
    return lambda value: run(MODEL, IDS, [Set(place, value)], backend=backend).logits, there


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("backend", FAST)
def test_they_are_refused(backend: str, name: str, training: bool) -> None:
    """torch's own `once_differentiable` would let `hessian` and `jvp` take them for zero."""
    logits, there = output(name, backend)
    MODEL.train(training)
    with pytest.raises(BackendUnavailable, match="create_graph"):
        hessian(lambda value: logits(value).square().sum(), there)
    with pytest.raises(BackendUnavailable, match="create_graph"):
        jvp(logits, there, there)
    with pytest.raises(BackendUnavailable, match="create_graph"):
        torch.autograd.grad(logits(there).sum(), [*MODEL.parameters()], create_graph=True)


@pytest.mark.parametrize("name", PLACES)
def test_the_readable_model_has_them(name: str) -> None:
    logits, there = output(name, "reference")
    way = draw(*there.shape)
    ahead, behind = (logits(there + step * way).detach() for step in (1e-5, -1e-5))
    want, got = (ahead - behind) / 2e-5, jvp(logits, there, way)[1]
    assert (got - want).norm() <= 1e-7 * want.norm()

"""Small models for the tests, under whose weights a fault in the scan shows in the logits."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels_bridge.lively import lively
from minimal_mamba import Mamba, MambaConfig
from minimal_mamba.tap import Tap

__all__ = [
    "LAST", "WideTorch", "by_turns", "draw", "error", "lively", "names_drawn", "near", "needs_hf_scan", "slow", "tiny",
]  # fmt: skip


def needs_hf_scan() -> None:
    """Skip where transformers is older than the benchmark's, 5.15: its scan is no function that can be replaced."""
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    if not hasattr(modeling, "mamba_selective_scan"):
        pytest.skip("needs transformers 5.15, as mambascope[bench] does")


def slow(*values: Any) -> list[Any]:
    """Values of a parameter that `make test-slow` alone takes."""
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow) for v in values]


def by_turns(names: Iterable[str]) -> list[Any]:
    """(name, True) and (name, False) of each, of which `make test` takes one, the one and the other by turns."""
    turns = [[(name, i % 2 == 0), (name, i % 2 == 1)] for i, name in enumerate(names)]
    return [one for first, second in turns for one in (first, *slow(second))]


class WideTorch:
    """torch, but its float32 is float64: for HF's modules, whose code casts to it."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _Last(Tap):
    """Touches nothing, and lets only the last token go on behind the scan."""

    last_only = True


LAST = _Last()


def tiny(*, seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: Any) -> Mamba:
    """A lively float64 model whose sizes are pairwise distinct: v 32 (29 tokens), e 24, d 12, n 5, r 4, k and layers 3.

    Args:
        seed: of the weights. dtype: of the weights. overrides: fields of `MambaConfig`.
    """
    sizes: dict[str, Any] = {"d_model": 12, "n_layer": 3, "vocab_size": 29, "d_state": 5, "d_conv": 3, "dt_rank": 4}
    with torch.random.fork_rng(devices=[]):  # the initial weights are drawn from the global generator, then replaced
        model = Mamba(MambaConfig(**sizes | overrides))
    return lively(model.to(dtype), seed)


def error(got: Tensor, want: Tensor) -> float:
    """How far apart, in norms of what is wanted, in float64."""
    assert got.shape == want.shape
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp(min=1e-9))


def near(got: Tensor, want: Tensor, tol: float = 1e-12) -> None:
    """Of one shape and type, and apart by at most so much of the norm."""
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got - want).norm() <= tol * want.norm().clamp(min=1e-9), f"off by {(got - want).norm() / want.norm():.1e}"


def draw(*size: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def names_drawn(ax, which: str) -> list[str]:
    """The names along an axis as they are drawn; fails where two of them overlap."""
    ax.figure.set_dpi(400)  # so that text is as large as it says, and not whole pixels
    ax.figure.canvas.draw()
    axis = ax.xaxis if which == "x" else ax.yaxis
    sides = [label for tick in axis.get_major_ticks() for label in (tick.label1, tick.label2)]
    names = [label for label in sides if label.get_visible() and label.get_text()]
    boxes = [name.get_window_extent() for name in names]
    ends = sorted((box.x0, box.x1) if which == "x" else (box.y0, box.y1) for box in boxes)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends))
    return [name.get_text() for name in names]

"""The recurrence of one layer written out once more, as a plain loop: the truth that fast scans are judged by."""

from collections.abc import Sequence

import torch
from torch import Tensor

LENGTHS = (1, 2, 3, 7, 63, 129, 500)
RTOL = 1e-12  # relative norm
b, e, n = 2, 5, 3


def loop(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor,
    keep: Sequence[int] = (), added: Tensor | None = None, added_at: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The recurrence as it is written."""
    ys, states = [], []
    for t in range(u.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + dt[:, t, :, None] * B[:, t, None, :] * u[:, t, :, None]
        if t in added_at:
            h = h + added[:, list(added_at).index(t)]
        ys.append((h * C[:, t, None, :]).sum(-1))
        states.append(h)
    kept = torch.stack([states[t] for t in keep], 1) if keep else h.new_empty(len(h), 0, *h.shape[1:])
    return torch.stack(ys, 1), h, kept


def inputs(l: int, mean_dt: float = 0.3, e: int = e, n: int = n, b: int = b) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    dt = mean_dt * 2 * torch.rand((b, l, e), generator=g, dtype=torch.float64)
    return [normal(b, l, e), dt, -torch.exp(normal(e, n)), normal(b, l, n), normal(b, l, n), normal(b, e, n)]


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def near(got: Tensor, want: Tensor, rtol: float = RTOL) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    assert torch.isfinite(got).all()
    assert (got - want).norm() <= rtol * want.norm().clamp(min=1e-12), f"off by {(got - want).norm() / want.norm():.1e}"

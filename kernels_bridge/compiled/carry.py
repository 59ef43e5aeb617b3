"""`kernels_bridge.carry` through a compiled loop."""

from torch import Tensor

from .loop import run


def carry(delta: Tensor, first: Tensor, count: int, dt: Tensor, A: Tensor, C: Tensor, gate: Tensor) -> Tensor:
    """`kernels_bridge.carry.carry`, with the same arguments and results, compiled; 0 beyond the run's last position."""
    from . import kernels, mixer_kernels

    (k, b, e, n), w = delta.shape, delta.dtype
    made, wide = delta.new_empty(k, b, count, e), kernels.width(n)
    inputs = (x.to(w).contiguous() for x in (delta, dt, A.T, C, gate))
    run(mixer_kernels.carry, b * -(-e // wide), made.numel() * n, wide, *inputs, first.contiguous(), made)
    return made

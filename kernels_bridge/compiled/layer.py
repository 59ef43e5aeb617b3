"""What a layer does beside its scan, compiled: the norm between two layers, and the single step of a mixer."""

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from numpy import empty_like
from torch import Tensor, from_numpy, nn

from minimal_mamba.block import Mixer, RMSNorm
from minimal_mamba.scan import Memory, Step

from .. import step as plain
from .loop import Array, array, spread


@torch.no_grad()
def step(mixer: Mixer) -> Step:
    """A mixer's step in one loop, which reads the weights once for all rows.

    Cost: reading the weights; of each row a multiply-add with each of them, and an exp for each of (e, n).
    """
    weights = plain.weights(mixer)
    none = weights.A.new_empty(0)
    one_type = all(x is None or x.dtype == weights.A.dtype for x in weights)
    if not one_type or torch.is_autocast_enabled("cpu"):  # 16 bits, which the loop does not have
        return partial(plain.advance, weights, mixer.rms_eps)
    arrays = [array(none if x is None else x) for x in (*weights, None)]
    eps = -1.0 if mixer.rms_eps is None else mixer.rms_eps
    return partial(_advance, arrays, eps, sum(a.size for a in arrays) // 8)


def _advance(weights: Sequence[Array], eps: float, work: int, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
    from .token_kernels import step as loop

    rows, given, h, window = len(x), array(x), array(memory[0]), array(memory[1])
    out, h_after, window_after = empty_like(given), empty_like(h), empty_like(window)
    spread(
        loop, rows, rows * work, given.dtype, *weights, eps, given[:, 0], h, window, out[:, 0], h_after, window_after
    )
    return from_numpy(out), (from_numpy(h_after), from_numpy(window_after))


def add_norm(resid: Tensor, mixed: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """resid + mixed (b, l, d) and its norm, in one loop where no gradient is wanted and all have one type."""
    plus, weight = resid[:0] if mixed is None else mixed, cast(Tensor, norm.weight)
    one_type = resid.dtype == plus.dtype == weight.dtype and weight.dtype in (torch.float32, torch.float64)
    if torch.is_grad_enabled() or not one_type or not isinstance(norm, RMSNorm):
        total = resid if mixed is None else resid + mixed
        return total, norm(total)
    from .token_kernels import add_norm as loop

    given = array(resid)
    (b, l, d), sums, normals = given.shape, empty_like(given), empty_like(given)
    spread(loop, b * l, 2 * b * l * d, given.dtype, norm.eps, given, array(plus), array(weight), sums, normals)
    return from_numpy(sums), from_numpy(normals)

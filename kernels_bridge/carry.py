"""What a change of states does to later tokens of the same layer, which is linear in them."""

import torch
from torch import Tensor

BLOCK = 16  # tokens whose decays are made at once


def carry(delta: Tensor, first: Tensor, count: int, dt: Tensor, A: Tensor, C: Tensor, gate: Tensor) -> Tensor:
    """How `gated` changes if the states before some positions are others: many changes k of one run of b rows.

        h_t = exp(dt_t A) h_{t-1}        gate_t (C_t h_t)

    Args:
        delta: (k, b, e, n) the changes, float32 or wider. first: (k, b) the positions before which they are.
        count: of positions, from there on.
        dt, gate: (b, l, e). A: (e, n). C: (b, l, n); of the run.
    Returns:
        (k, b, count, e), of delta's type; beyond the run's last position, whatever is finite.
    Cost: one multiplication and one multiply-add for each of (k, b, count, e, n); the decays are made once for all k.
    """
    (k, b, e, n), l = delta.shape, dt.shape[1]
    begin = first.amin(0)  # (b,) where the row's first change is
    late = (first - begin).flatten()  # (k b,) how much later each is
    steps = int(late.max()) + count
    span = (begin[:, None] + torch.arange(steps, device=begin.device)).clamp(max=l - 1)  # (b, steps)
    row = torch.arange(b, device=begin.device)[:, None]
    dt, C = dt[row, span].transpose(0, 1), C[row, span].to(delta.dtype).transpose(0, 1)  # (steps, b, e), (steps, b, n)
    joins = {int(j): (late == j).nonzero()[:, 0] for j in late.unique()}
    A_t, delta = A.T.contiguous(), delta.flatten(0, 1).transpose(1, 2)  # (n, e), (k b, n, e)
    state, y = delta.new_zeros(k * b, n, e), delta.new_empty(steps, k, b, 1, e)
    for start in range(0, steps, BLOCK):
        decays = (dt[start : start + BLOCK, :, None] * A_t).exp_()  # (BLOCK, b, n, e)
        for t, decay in enumerate(decays.unbind(0), start):
            if (mine := joins.get(t)) is not None:
                state[mine] = delta[mine]
            state.view(k, b, n, e).mul_(decay)
            torch.matmul(C[t][:, None], state.view(k, b, n, e), out=y[t])
    own = late[:, None] + torch.arange(count, device=late.device)  # (k b, count)
    y = y.view(steps, k * b, e)[own, torch.arange(k * b, device=late.device)[:, None]].view(k, b, count, e)
    times = (first[..., None] + torch.arange(count, device=first.device)).clamp(max=l - 1)  # (k, b, count)
    return y.mul_(gate[row, times])

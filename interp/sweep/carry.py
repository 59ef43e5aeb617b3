"""What an edit inside a layer changes later in that layer: the state alone, in which the layer is linear."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minimal_mamba.block import Mixer
from minimal_mamba.scan import Ops

SCANNED = ("x", "u", "dt", "B", "C", "gate")
BLOCK = 16  # tokens whose decays are made at once


@dataclass(frozen=True, eq=False)
class Scanned:
    """A layer's inputs of conv and scan in the base run, and its gate: x, u, dt, gate (b, l, e), B, C (b, l, n)."""

    x: Tensor
    u: Tensor
    dt: Tensor  # 0 on padding
    B: Tensor
    C: Tensor
    gate: Tensor

    def states(self, mixer: Mixer, times: Tensor, h: Tensor, ops: Ops, real: Tensor | None = None) -> Tensor:
        """The base run's state (c, b, e, n) after the positions `times` (c, b, m), from the one before them, h.

        Where not `real` (b, m), no time passes.
        """
        c, b, _ = times.shape
        times = times.clamp(max=self.dt.shape[1] - 1).to(h.device)
        at = torch.arange(b, device=h.device)[:, None], times
        u, dt, B, C = (x[at].flatten(0, 1) for x in (self.u, self.dt, self.B, self.C))
        dt = dt if real is None or real.all() else dt * real[:, :, None].to(h.device)
        return ops.scan(u, dt, _decay_rates(mixer, h), B, C, h.flatten(0, 1))[1].unflatten(0, (c, b))

    def window(self, start: Tensor, width: int) -> Tensor:
        """The base run's last conv inputs (b, e, k) before the positions `start` (b,), newest last."""
        times = (start[:, None] + torch.arange(-width, 0)).to(self.x.device)
        last = self.x[torch.arange(len(start), device=self.x.device)[:, None], times.clamp(min=0)]
        return (last * (times >= 0)[:, :, None]).transpose(1, 2)

    def after(self, mixer: Mixer, delta: Tensor, row: Tensor, times: Tensor, sizes: Tensor, tokens: int) -> Tensor:
        """How `gated` changes behind the first tokens, if the state after them is another by `delta`.

            h_t = exp(dt_t A) h_{t-1}        gate_t (C_t h_t)

        Args:
            delta: (rows, e, n). row: (rows,) of the base run. times: (rows, m) positions. sizes: (rows,) of them real.
            tokens: how many of a row's positions lie before.
        Returns:
            (rows, m - tokens, e)
        Cost: one multiplication and one multiply-add of (e, n) a token; the decays are made once for all cells.
        """
        b, l, e = self.dt.shape
        n, k = delta.shape[2], len(delta) // b
        begin = times[:, 0].view(k, b).amin(0)  # (b,) where the row's first cell begins
        late = times[:, 0] - begin[row]  # (rows,) how much later each begins
        steps = int(late.max()) + times.shape[1]
        span = (begin[:, None] + torch.arange(steps, device=begin.device)).clamp(max=l - 1)  # (b, steps)
        at = torch.arange(b, device=begin.device)[:, None], span
        dt, C = self.dt[at].transpose(0, 1), self.C[at].to(delta.dtype).transpose(0, 1)  # (steps, b, e), (steps, b, n)
        A_t = _decay_rates(mixer, delta).T.contiguous()  # (n, e)
        joins = {int(j): (late == j).nonzero()[:, 0] for j in late.unique()}
        delta = delta.transpose(1, 2)  # (rows, n, e)
        state = torch.zeros(k * b, n, e, dtype=delta.dtype, device=delta.device)
        y = delta.new_empty(steps, k, b, 1, e)
        for first in range(tokens, steps, BLOCK):
            decays = (dt[first : first + BLOCK, :, None] * A_t).exp_()  # (BLOCK, b, n, e)
            for t, decay in enumerate(decays.unbind(0), first):
                if (mine := joins.get(t - tokens)) is not None:
                    state[mine] = delta[mine]
                state.view(k, b, n, e).mul_(decay)
                torch.matmul(C[t][:, None], state.view(k, b, n, e), out=y[t])
        y = y.view(steps, k * b, e)
        own = late[:, None] + torch.arange(tokens, times.shape[1], device=late.device)  # (rows, m - tokens)
        y = y[own, torch.arange(k * b, device=late.device)[:, None]]
        return (y * self.gate[row[:, None], times[:, tokens:]]).to(self.u.dtype)

    def last(self, mixer: Mixer, delta: Tensor, row: Tensor, times: Tensor, sizes: Tensor, tokens: int) -> Tensor:
        """How `gated` changes at each row's last token: (rows, e); arguments as of `after`.

        h = exp(A sum dt) delta: products of decays as one exponential, of a sum formed forward.
        """
        ends = times[torch.arange(len(times)), sizes.to(times.device) - 1]
        later = self.dt.flip(1).cumsum(1).flip(1) - self.dt  # (b, l, e): the sum over what follows
        passed = later[row, times[:, tokens - 1]]  # (rows, e)
        h = delta * torch.exp(passed[..., None] * _decay_rates(mixer, delta))
        y = torch.matmul(h, self.C[row, ends].to(h.dtype)[..., None])[..., 0]
        return (y * self.gate[row, ends]).to(self.u.dtype)


def _decay_rates(mixer: Mixer, like: Tensor) -> Tensor:
    return -torch.exp(mixer.A_log.to(like.dtype))  # (e, n)

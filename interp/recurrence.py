"""What made a layer's states in a run, taken apart: shared by the lenses, hidden attention and the time scales."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import einsum
from torch import Tensor

from minimal_mamba import Address, Edit, Mamba, MambaState, at
from minimal_mamba.address import resolve
from minimal_mamba.block import wide
from minimal_mamba.brief import Brief
from minimal_mamba.errors import EditError

from .positions import on_tokens
from .run import Run, each

INSIDE = ("decay", "state_write", "ssm_state", "state_read", "recurrent_state", "y")


@dataclass(frozen=True, eq=False, repr=False)
class Recurrence(Brief):
    """What made one layer's states in a run, after edits: h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, read as C_t h_t.

    Args:
        dt, u: (b, l, e), dt 0 on padding. B, C: (b, l, n). A: (e, n). h0: (b, e, n) before the first token.
    """

    dt: Tensor
    u: Tensor
    B: Tensor
    C: Tensor
    A: Tensor
    h0: Tensor

    def sources(self, weight: Tensor, t: Tensor) -> Iterator[tuple[Tensor | None, Tensor]]:
        """What each earlier token put into sum(weight h_t), from t backward, then what was there before the first.

            weight h_t = sum_s weight prod_{s < r <= t} decay_r write_s + weight prod_{r <= t} decay_r h0

        Args:
            weight: (b, e, n). t: (b,) the position of each row, counted from this run's first token.
        Returns:
            (s, share) one after the other: s (b,) is t, t - 1, ..., below 0 where a row has no more tokens (its share
            is then 0); last of all, s is None and the share is that of h0. share (b, e, n).
        Cost: max(t) + 1 steps of (b, e, n), and nothing else of that size. Decays are multiplied, never divided.
        """
        rows = torch.arange(len(t), device=weight.device)
        t = t.to(weight.device)
        for s in (t - j for j in range(int(t.max()) + 1)):
            now = (rows, s.clamp(min=0))
            dt = self.dt[now] * (s >= 0)[:, None]  # where a row has no token no time passes
            yield s, weight * einsum(dt * self.u[now], self.B[now], "b e, b n -> b e n")
            weight = weight * torch.exp(dt[:, :, None] * self.A)
        yield None, weight * self.h0


def recurrence(model: Mamba, out: Run, layer: int, state: MambaState | None) -> Recurrence:
    """One layer's `Recurrence`, from a run that recorded `recurrence_sites(layer)`."""
    dt, u, B, C = (on_tokens(out, a).to(wide(model.dtype)) for a in recurrence_sites(layer))
    before = model.initial_state(len(out.ids)) if state is None else state
    A = model.backbone.layers[layer].mixer.A(dt.dtype)
    return Recurrence(dt, u, B, C, A, before.ssm_state[layer])


def recurrence_sites(layer: int) -> list[Address]:
    """What to record of a layer for its `recurrence`."""
    return [at.dt(layer=layer), at.u(layer=layer), at.B(layer=layer), at.C(layer=layer)]


def outside(edits: Edit | Iterable[Edit], layers: Sequence[int], n_layer: int) -> list[Edit]:
    """The edits as a list; raises EditError for one that overrules what these layers' dt, B, C and u make."""
    several = list(each(edits, Edit))
    for edit in several:
        place = getattr(edit, "address", None)  # what is no edit, `run` refuses
        if place is None or place.site not in INSIDE:
            continue
        if {*resolve(place.layer, n_layer, "layer")} & {*layers}:
            raise EditError(
                f"{edit}: this method takes a layer's state apart into what dt, B and u wrote and C reads, which an "
                f"edit of {place.site} overrules. Edit dt, u, B or C (dt = 0 keeps a token out), or take other layers."
            )
    return several

"""Pairs of runs of which one is given what a place holds in the other: how they are run, and along what they differ."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from minimal_mamba import Address, Mamba, MambaState, Plan, Set
from minimal_mamba.errors import EditError, InputError

from .metrics import accuracy, log_prob
from .probe_fit import wilson
from .run import Lengths, Run, donor_of, known, run, span

SMALL = 1e-10  # of the largest variance: a principal component below it is rounding
MOST = 0.99  # of the mean square, in the units of the swap


AnyModule = TypeVar("AnyModule", bound=nn.Module)


@dataclass(frozen=True)
class Swapped:
    """What came of a swap: the share of rows that gave the target, its 95 % interval (Wilson's), mean log p(target)."""

    accuracy: float
    interval: tuple[float, float]
    log_prob: float  # nats
    rows: int


class Pairs:
    """Pairs of prompts, what a place holds in each, and runs of the base in which it holds something else.

    What comes before the place's first position is run once. The weights are the model's, without gradients of theirs.

    Attributes:
        base, donor: (b, f) float64. shape: of a row of them. dtype: of the place. noise: (f,) their rounding.
        tokens: of each pair, both prompts' without padding.
    """

    def __init__(
        self, model: Mamba, ids: Tensor, donor_ids: Tensor, targets: Tensor | Sequence[int], place: Address,
        lengths: Lengths, state: MambaState | None, batch: int, backend: str,
    ):  # fmt: skip
        known(model)
        if not isinstance(place, Address):
            raise EditError(f"place={place!r:.60} is no address; make one with at.<site>(layer=, pos=).")
        self.ids, sizes = model.check(ids, lengths, state)
        self.donor_ids = donor_of(model, self.ids, donor_ids)
        b, both = len(self.ids), (self.ids.tolist(), self.donor_ids.tolist())
        self.tokens = [(*one[:n], *other[:n]) for one, other, n in zip(*both, sizes.tolist(), strict=True)]
        try:
            wanted = torch.as_tensor(targets)
        except (TypeError, ValueError, RuntimeError):
            wanted = torch.empty(0)
        if wanted.shape != (b,):
            raise InputError(f"targets={targets!r:.60}: the id of a token for each pair, ({b},) integers.")
        self.targets = model.check(wanted[:, None], name="targets")[0][:, 0]
        self.model, self.place, self.batch, self.backend = still(model), place, batch, backend
        self.axis = int(place.layer_axis)
        base, donor = self._record(self.ids, sizes, state), self._record(self.donor_ids, sizes, state)
        self.dtype, self.shape = base.dtype, base.shape[1:]
        self.base, self.donor = base.flatten(1).double(), donor.flatten(1).double()
        self.noise = 8 * torch.finfo(self.dtype).eps * self.base.abs().amax(0)
        self.tail, self.left, self.memory = self._cut(sizes, state)

    @torch.no_grad()
    def _record(self, ids: Tensor, sizes: Tensor, state: MambaState | None) -> Tensor:
        """(b, *shape) what the place holds."""
        found = []
        for rows in torch.arange(len(ids)).split(self.batch):
            out = run(self.model, ids[rows], (), [self.place], self.backend, rows_of(state, rows), lengths=sizes[rows],
                      last_only=True)  # fmt: skip
            found.append(first_axis(out.records[self.place], self.axis))
        values = torch.cat(found)
        if not values.isfinite().all() or values.dim() < 2:
            raise InputError(
                f"{self.place} holds {'numbers that are not finite' if values.dim() > 1 else 'one number a row'}: name "
                "positions that all rows have, such as -1, and places with more than one number."
            )
        return values

    @torch.no_grad()
    def _cut(self, sizes: Tensor, state: MambaState | None) -> tuple[Tensor, Tensor, MambaState | None]:
        """The tokens from the place's first position on, how many of them each row has, and the memory before them."""
        start, stop = span(self.ids, sizes, state)
        item = Plan(self.model.config, (), [self.place], start, stop).of[id(self.place)][0]
        before = item.pos.where(item.pos >= 0, stop[:, None]).amin(1) - start
        if int(before.min()) == 0:
            return self.ids, sizes, state
        kept = [
            run(self.model, self.ids[rows, : int(before[rows].max())], (), (), self.backend, rows_of(state, rows), True,
                before[rows], last_only=True).state
            for rows in torch.arange(len(self.ids)).split(self.batch)
        ]  # fmt: skip
        left = sizes - before
        columns = (before[:, None] + torch.arange(int(left.max()))).clamp(max=self.ids.shape[1] - 1)
        every = [[torch.cat(parts) for parts in zip(*memories, strict=True)]
                 for memories in ([s.ssm_state for s in kept], [s.conv_state for s in kept])]  # fmt: skip
        memory = MambaState(tuple(every[0]), tuple(every[1]), torch.cat([s.position for s in kept]))
        return self.ids.gather(1, columns.to(self.ids.device)), left, memory

    def run(self, rows: Tensor, values: Tensor) -> Run:
        """The base's run of these rows, the place holding values (rows, f)."""
        edit = Set(self.place, values.unflatten(1, self.shape).movedim(0, self.axis))
        left = self.left[rows]
        return run(self.model, self.tail[rows, : int(left.max())], [edit], (), self.backend,
                   rows_of(self.memory, rows), lengths=left, last_only=True)  # fmt: skip

    @torch.no_grad()
    def score(self, rows: Tensor, values: Tensor, targets: Tensor) -> Swapped:
        """How often runs of these rows end in their targets, the place holding values (rows, f)."""
        right, said = torch.zeros(0), torch.zeros(0)
        for i, some in zip(torch.arange(len(rows)).split(self.batch), rows.split(self.batch), strict=True):
            out = self.run(some, values[i].to(self.dtype))
            right = torch.cat([right, accuracy(out, targets[some]).cpu()])
            said = torch.cat([said, log_prob(out, targets[some]).cpu()])
        share, n = right.double().mean().item(), len(rows)
        return Swapped(share, wilson(share, n), said.double().mean().item(), n)


def rows_of(state: MambaState | None, rows: Tensor) -> MambaState | None:
    """The memory of some rows."""
    if state is None:
        return None
    h, window = (tuple(x[rows.to(x.device)] for x in part) for part in (state.ssm_state, state.conv_state))
    return MambaState(h, window, state.position[rows])


def first_axis(values: Tensor, axis: int) -> Tensor:
    """A recording with the batch's axis in front of the layers'."""
    return values.movedim(axis, 0) if values.dim() > axis else values


def principal_axes(d: Tensor, noise: Tensor, dims: int | None) -> Tensor:
    """Orthonormal axes (f, m) of the space of the first principal components of the rows d (n, f).

    The components are those of the rows with each coordinate in units of its own, so that none is lost for being small:
    `dims` of them, or all that are more than rounding.

    Args:
        noise: (f,) a coordinate that varies by less does not vary.
    """
    size = d.square().mean(0).sqrt()
    scaled = d * torch.where(size > noise, 1 / size, 0)
    variance, u = torch.linalg.eigh(scaled @ scaled.T)  # (n,), (n, n)
    variance, u = variance.flip(0), u.flip(1)
    keep = int((variance > SMALL * variance[0].clamp(min=1e-300)).sum())
    return span_of(d.masked_fill(size <= noise, 0.0).T @ u[:, : keep if dims is None else min(keep, dims)])


def most_varying(d: Tensor) -> Tensor:
    """The fewest principal directions (f, m), orthonormal, that hold 99 % of the mean square of the rows d (n, f)."""
    _, s, v = torch.linalg.svd(d, full_matrices=False)
    held = s.square().cumsum(0)
    return v[: int((held < MOST * held[-1]).sum()) + 1].T


def span_of(vectors: Tensor) -> Tensor:
    """Orthonormal columns that span those of vectors (f, m), the principal ones first; fewer where they depend.

    The largest number of each is positive: else rounding would choose the signs, and with them where a search begins.
    """
    q, r = torch.linalg.qr(vectors)
    u, s, _ = torch.linalg.svd(r)
    found = q @ u[:, s > 1e-12 * s[:1]]
    return found * found.gather(0, found.abs().argmax(0, keepdim=True)).sign()


def still(model: AnyModule) -> AnyModule:
    """The module with the same weights, of which no gradient is wanted, so that only what an edit reaches is traced."""
    plain = {id(p): nn.Parameter(p.detach().clone() if p.is_inference() else p.detach(), requires_grad=False)
             for p in model.parameters()}  # fmt: skip
    return copy.deepcopy(model, plain)

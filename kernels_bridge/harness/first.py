"""The first place where a target parts from the reference, or two implementations from each other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minimal_mamba import Mamba

from .rows import Row, by_position, compare, errors
from .targets import reference, roundings
from .watch import ORDER, WHOLE, Implementation, of_layers

LONG = 65  # tokens up to which every state is held at once


@dataclass(frozen=True)
class First:
    """The first place, in the forward's order, where a target leaves its bound when it is fed the reference's input."""

    site: str
    layer: int | None
    row: int | None
    position: int | None
    channel: tuple[int, ...]
    error: float

    def __str__(self) -> str:
        where = "" if self.layer is None else f" of layer {self.layer}"
        if self.position is None:
            return f"{self.site}{where} (relative error {self.error:.2g})"
        return (
            f"{self.site}{where}, row {self.row}, position {self.position}, channel {self.channel} ({self.error:.2g})"
        )


def localise(target: Implementation, model: Mamba, ids: Tensor) -> First | None:
    """The first site that parts from the reference, each layer fed with the reference's input; None if none does.

    In long rows the states are asked for at one position only, the first at which another site parts.
    """
    true = reference(model)
    feed, l = of_layers("resid_pre", true.forward(ids)), ids.shape[1]
    everyone = (target, true, *roundings(model))

    def part(positions: Sequence[int]) -> First | None:
        found, want, *same = (one.forward(ids, feed=feed, at_positions=positions) for one in everyone)
        own = [errors(one, want) for one in same]
        return first_to_part(compare("", "layers", found, own, want, model.dtype), found, want, positions)

    if l <= LONG:
        return part(range(l))
    first = part(())
    return first if first is None or first.position is None else part([first.position])


def first_to_part(
    rows: Sequence[Row], found: dict[Any, Tensor], want: dict[Any, Tensor], positions: Sequence[int]
) -> First | None:
    """Of the rows that failed the first in the forward's order, and where in it the error begins.

    Args:
        positions: at which the states are held.
    """
    rank = {site: i for i, site in enumerate(ORDER)}
    failed = [r for r in rows if not r.passed and r.quantity in rank]
    if not failed:
        return None
    row = min(failed, key=lambda r: (math.inf if r.layer is None else r.layer, rank[r.quantity]))
    key = (row.quantity, row.layer)
    if found[key].shape != want[key].shape:
        return First(row.quantity, row.layer, None, None, (), math.inf)
    off = by_position(found[key], want[key])  # (b, l)
    limit = row.bound if row.worst_bound is None or row.error > row.bound else row.worst_bound
    beyond = (off > limit).any(0).nonzero()[:, 0]
    place = int(beyond[0]) if len(beyond) else int(off.amax(0).argmax())
    batch = int(off[:, place].argmax())
    gap = (found[key][batch, place].double() - want[key][batch, place].double()).abs().nan_to_num(nan=math.inf)
    channel = torch.unravel_index(gap.flatten().argmax(), gap.shape)
    position = place if row.quantity in WHOLE else positions[place]
    return First(row.quantity, row.layer, batch, position, tuple(int(c) for c in channel), float(off[batch, place]))

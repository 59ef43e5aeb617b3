"""Steering: a direction found from contrasts, added or projected out while the model runs or generates.

place = at.resid_post(layer=3, pos=-1)
happy = contrast(place, run(model, good, record=[place])[place], run(model, bad, record=[place])[place])
out = generate(model, ids, 20, edits=happy.add(2.0, pos=slice(4, None)))    # from position 4 on, also what is new
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from minimal_mamba import Add, Address, Mamba, MambaState, Project
from minimal_mamba.address import selector
from minimal_mamba.block import wide
from minimal_mamba.brief import Brief
from minimal_mamba.edits import Rows
from minimal_mamba.errors import EditError, InputError, of_type

from .run import Lengths, Metric, apply_metric, run
from .sweep import sweep

Positions = int | slice | Sequence[int]


@dataclass(frozen=True, eq=False, repr=False)
class Direction(Brief):
    """A direction at a site of one layer.

    Args:
        place: the address that it was found at; its positions are replaced where the direction is used.
        vector: of norm 1, in the shape of the place's feature axes.
        size: the norm of the difference that it came from, in the site's unit: strength 1 adds this much.
    """

    place: Address
    vector: Tensor
    size: float

    def add(self, strength: float = 1.0, pos: Positions = slice(None), *, rows: Rows = None) -> Add:
        """Add strength times the whole difference at these positions; an open slice goes on while generating."""
        return Add(self._at(pos), strength * self.size * self.vector, rows=rows)

    def remove(self, pos: Positions = slice(None), *, rows: Rows = None) -> Project:
        """Project the direction out: what is left has no part along it."""
        return Project(self._at(pos), self.vector[None], rows=rows)

    def keep(self, pos: Positions = slice(None), *, rows: Rows = None) -> Project:
        """Keep the part along the direction and nothing else."""
        return Project(self._at(pos), self.vector[None], keep=True, rows=rows)

    def random(self, seed: int) -> "Direction":
        """A control: a direction drawn evenly from all, of the same size at the same place."""
        rng = torch.Generator().manual_seed(seed)
        drawn = torch.randn(self.vector.shape, generator=rng, dtype=torch.float64)
        return replace(self, vector=(drawn / drawn.norm()).to(self.vector))

    def _at(self, pos: Positions) -> Address:
        return replace(self.place, pos=selector(pos, "pos"))


def contrast(place: Address, positive: Tensor, negative: Tensor) -> Direction:
    """The direction from one set of recordings of a place to another: the difference of their means.

        vector = d / |d|, size = |d|, d = mean(positive) - mean(negative)

    Args:
        place: a place of one layer; positive, negative: `run_[place]` of two runs, (b, [positions], *features), whose
            numbers of rows may differ. With a slice of positions, those of which all numbers are NaN are taken for
            a padded row's and left out; a row must have some.
    Raises:
        EditError: several layers, no feature axis. InputError: shapes that do not fit, means that are equal.
    Source: Turner et al. 2023, "Steering language models with activation engineering"; the difference of means as in
        Marks & Tegmark 2023 (arXiv:2310.06824).
    """
    of_type("place", place, Address, "at.<site>(layer=, pos=)")
    axes = sum(not isinstance(f, int) for f in place.features)
    if axes == 0 or place.layer_axis:
        raise EditError(f"{place}: a direction lives in one layer, with at least one feature axis left by the address.")
    means = []
    for what, values in (("positive", positive), ("negative", negative)):
        lead = 1 if isinstance(place.pos, int) else 2
        if not isinstance(values, Tensor):
            raise InputError(f"{what} is a {type(values).__name__}: give what was recorded, such as run_[{place}].")
        if values.dim() != lead + axes:
            raise InputError(f"{what} has shape {tuple(values.shape)}; {place} records {lead + axes} axes, (b, ...).")
        samples = values.detach().to(wide(values.dtype)).flatten(lead)  # (b, [positions], features)
        has = ~samples.isnan().all(-1)
        if not len(samples) or not has.reshape(len(samples), -1).any(1).all():
            raise InputError(f"{what} holds rows of NaN alone, or none: look for where the model's numbers overflow.")
        means.append(samples[has].mean(0).reshape(values.shape[lead:]))
    if means[0].shape != means[1].shape:
        raise InputError(f"positive has features {tuple(means[0].shape)}, negative {tuple(means[1].shape)}.")
    difference = means[0] - means[1]
    size = float(difference.norm())
    if not 0 < size < float("inf"):
        raise InputError(f"the means of the two sets differ by {size} in norm: there is no direction between them.")
    return Direction(place, difference / size, size)


@dataclass(frozen=True, eq=False, repr=False)
class SteeringCurve(Brief):
    """A metric against the strength of a direction, and of random directions of the same size.

    Args:
        strengths: (s,). values: (s, b) in the metric's unit. controls: (c, s, b), one for each random direction.
    """

    strengths: Tensor
    values: Tensor
    controls: Tensor


@torch.no_grad()
def steering_curve(
    model: Mamba, ids: Tensor, direction: Direction, metric: Metric, strengths: Iterable[float], *,
    pos: Positions = slice(None), controls: int = 10, seed: int = 0, lengths: Lengths = None,
    state: MambaState | None = None, backend: str = "auto", progress: bool = True,
) -> SteeringCurve:  # fmt: skip
    """What a direction does to a metric at each strength, beside what random directions of its size do.

    Args:
        metric: logits (b, l, v) -> (b,); with `lengths` it is given each row's last token, (b, 1, v).
        strengths: at least one, in units of the direction's size.
        controls: how many random directions, drawn with seed, seed + 1, ...
    Cost: a `sweep` of strengths * (1 + controls) cells: of each the layers from the direction's on, from its first
        position on, in batches. From a carried `state`, as many whole forwards.
    """
    of_type("direction", direction, Direction, "that contrast gave")
    strengths = list(strengths)
    if not strengths or controls < 0 or not all(math.isfinite(strength) for strength in strengths):
        raise InputError(
            f"strengths={strengths}, controls={controls}: at least one finite strength, and 0 controls or more."
        )
    directions = [direction, *(direction.random(seed + i) for i in range(controls))]
    cells = [one.add(strength, pos) for one in directions for strength in strengths]
    if state is None:
        found = sweep(model, ids, cells, metric, lengths=lengths, backend=backend, progress=progress).values
    else:  # a sweep starts afresh
        rows, short = [], lengths is not None
        for edit in tqdm(cells, desc="steering", disable=not progress):
            out = run(model, ids, edit, (), backend, state, lengths=lengths, last_only=short)
            rows.append(apply_metric(metric, out.logits))
        found = torch.stack(rows)
    values = found.unflatten(0, (len(directions), len(strengths)))
    return SteeringCurve(torch.tensor(strengths, dtype=torch.float64), values[0], values[1:])

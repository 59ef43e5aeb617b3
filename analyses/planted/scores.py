"""Every method on every planted model: what it reports, against what is there.

A method is a function of a planted model that gives the cells it reports and the cells that are there. It sees the
model, prompts and metric, never the truth, and reports what exceeds `REPORT` of the gap between donor and base (or of
its own largest value, where it has a unit of its own).

    found all            recall: reported and there / there
    found nothing else   precision: reported and there / reported

Each is the worst of the seeds. Where nothing is there and nothing is reported both are 1.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .models import MODELS, plant
from .truth import NEGLIGIBLE, NOTABLE, Planted

REPORT = NOTABLE
SEEDS = tuple(range(4))
Cells = set[tuple[Hashable, ...]]
Table = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Found:
    """What a method reports, what is there, and, of a method that gives effects, its largest error / the gap."""

    reported: Cells
    there: Cells
    error: float | None = None

    @property
    def recall(self) -> float:
        """Share of what is there that is reported."""
        return len(self.reported & self.there) / len(self.there) if self.there else 1.0

    @property
    def precision(self) -> float:
        """Share of what is reported that is there."""
        return len(self.reported & self.there) / len(self.reported) if self.reported else 1.0


def above(values: Tensor, least: float) -> Cells:
    """The indices of the numbers whose size is above `least`."""
    return {tuple(i) for i in (values.abs() > least).nonzero().tolist()}


def compare(p: Planted, values: Tensor, truth: Tensor) -> Found:
    """Effects (..., b) in the metric's unit against the true ones: a cell counts by its largest row."""
    gap = float(p.gap.abs().max())
    found, there = above(values.abs().amax(-1), REPORT * gap), above(truth.abs().amax(-1), NEGLIGIBLE * gap)
    return Found(found, there, float((values - truth).abs().max()) / gap)


def coordinates(p: Planted, values: Mapping[tuple[int, int, int], Tensor]) -> Tensor:
    """(layers, e, n, ...) of what the truth says of single coordinates; 0 elsewhere."""
    c, rest = p.model.config, next(iter(values.values()), torch.zeros(len(p.ids))).shape
    out = torch.zeros(c.n_layer, c.d_inner, c.d_state, *rest, dtype=torch.float64)
    for place, value in values.items():
        out[place] = value
    return out


Method = Callable[[Planted], Found]


def score(method: Method, name: str, seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """One cell of the table: the worst of the seeds, how many cells are there, and the largest error if it has one."""
    found = [method(plant(name, seed)) for seed in seeds]
    errors = [f.error for f in found if f.error is not None]
    return {
        "recall": min(f.recall for f in found),
        "precision": min(f.precision for f in found),
        "there": [len(f.there) for f in found],
        "reported": [len(f.reported) for f in found],
        "error": max(errors) if errors else None,
    }


def score_all(methods: Mapping[str, Method], seeds: Sequence[int] = SEEDS, *, progress: bool = True) -> Table:
    """Every method on every model: {method: {model: score}}."""
    table: Table = {}
    with tqdm(total=len(methods) * len(MODELS), desc="planted", disable=not progress) as bar:
        for title, method in methods.items():
            table[title] = {}
            for name in MODELS:
                bar.set_postfix_str(f"{title} on {name}")
                table[title][name] = score(method, name, seeds)
                bar.update()
    return table

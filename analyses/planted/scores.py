"""Every method on every planted model: what it reports, against what is there.

A method is a function of a planted model that gives the cells it reports and the cells that are there. It sees the
model, prompts and metric, never the truth, and reports what exceeds `REPORT` of the gap between donor and base (or of
its own largest value, where it has a unit of its own).

    found all            recall: reported and there / there
    found nothing else   precision: reported and there / reported

Each is the worst of the seeds. Where nothing is there and nothing is reported both are 1.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from interp import (
    at,
    direct_logit,
    gradient_field,
    gradients,
    half_lives,
    knockout_grid,
    logit_lens,
    mean_dt,
    patch_grid,
    receptive_field,
    run,
    state_lens,
)  # fmt: skip

from .models import MODELS, plant
from .truth import NEGLIGIBLE, NOTABLE, Planted

REPORT = NOTABLE
SEEDS = tuple(range(6))
Cells = set[tuple[Hashable, ...]]


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


# -- patching and gradients -------------------------------------------------------------------------------------------


def patching(site: str) -> Callable[[Planted], Found]:
    """`patch_grid` over layers and positions."""

    def method(p: Planted) -> Found:
        grid = patch_grid(p.model, p.ids, p.donor_ids, site=site, metric=p.metric, progress=False)
        return compare(p, grid.effect(), p.truth.effects[site])

    return method


def by_gradient(p: Planted) -> Found:
    """Gradient times difference of each coordinate (e, n) of the state at one position."""
    pos = p.ids.shape[1] - 2
    states = at.ssm_state(pos=pos)
    slope = gradients(p.model, p.ids, p.metric, wrt=[states])[states]
    with torch.no_grad():
        base, donor = (run(p.model, ids, record=[states])[states] for ids in (p.ids, p.donor_ids))
    values = (slope * (donor - base)).movedim(1, -1)  # (layers, e, n, b)
    return compare(p, values, coordinates(p, {c: v[pos] for c, v in p.truth.coordinates.items()}))


# -- tokens -----------------------------------------------------------------------------------------------------------


def knocking_out(through: str) -> Callable[[Planted], Found]:
    """`knockout_grid` of every source from every target: cells (layer, source, target)."""

    def method(p: Planted) -> Found:
        gap, l = float(p.gap.abs().max()), p.ids.shape[1]
        reported: Cells = set()
        for target in range(1, l):
            grid = knockout_grid(
                p.model, p.ids, p.metric, target=target, sources=range(target), through=through, progress=False
            )
            reported |= {(i, s, target) for i, s in above(grid.effect().abs().amax(-1), REPORT * gap)}
        kinds = {"scan", "conv", "selection"} if through == "all" else {through}
        return Found(reported, {(f.layer, f.source, f.target) for f in p.truth.flows if f.kind in kinds})

    return method


def scan_flows(p: Planted) -> Cells:
    """(layer, source) of what the last token reads from the states."""
    return {(f.layer, f.source) for f in p.truth.flows if f.kind == "scan"}


def fields(p: Planted) -> Found:
    """`receptive_field` of the last token in each layer, all channels together."""
    share = torch.stack(
        [receptive_field(p.model, p.ids, i).share.flip(1).T for i in range(p.model.config.n_layer)]
    )  # (layers, positions, b)
    return Found(above(share.amax(-1), REPORT), scan_flows(p))


def gradient_fields(p: Planted) -> Found:
    """`gradient_field`: which tokens' embeddings the metric leans on."""
    share = gradient_field(p.model, p.ids, p.metric).share.flip(1).amax(0)  # (positions,)
    moves = p.truth.effects["resid_pre"][0].abs().amax(-1)
    return Found(above(share, REPORT), above(moves, NEGLIGIBLE))


# -- lenses -----------------------------------------------------------------------------------------------------------


def last_layer(p: Planted) -> int:
    """The layer that writes the answer."""
    return max(layer for layer, _ in p.truth.channels)


def logit_lenses(p: Planted) -> Found:
    """`logit_lens` at the last position: from which depth on the stream holds the answer."""
    tokens = torch.stack(p.tokens, 1)
    scores = logit_lens(p.model, p.ids, tokens, pos=-1)  # (layers + 1, b, 2)
    truth = torch.zeros(len(scores), len(p.ids), dtype=torch.float64)
    truth[last_layer(p) + 1 :] = p.truth.feature
    return compare(p, scores[..., 0] - scores[..., 1], truth)


def direct_logits(p: Planted) -> Found:
    """`direct_logit`: which layer's state or skip writes the answer; cells (layer, 0 read or 1 skip)."""
    parts = direct_logit(p.model, p.ids, *p.tokens)
    truth = torch.zeros(p.model.config.n_layer, 2, len(p.ids), dtype=torch.float64)
    truth[last_layer(p), 0 if p.truth.state else 1] = p.truth.feature
    return compare(p, torch.stack([parts.read, parts.skip], 1), truth)


def lens_coordinates(p: Planted) -> Found:
    """`state_lens` by channel and state dimension."""
    values = state_lens(p.model, p.ids, *p.tokens, by=("e", "n")).values.movedim(1, -1)
    return compare(p, values, coordinates(p, p.truth.held))


def lens_positions(p: Planted) -> Found:
    """`state_lens` by the position that wrote."""
    values = state_lens(p.model, p.ids, *p.tokens, by="pos").values.movedim(1, -1)  # (layers, l, b)
    truth = torch.zeros_like(values)
    truth[p.truth.layer] = p.truth.contributions.T
    return compare(p, values, truth)


# -- time scales ------------------------------------------------------------------------------------------------------


def lives(measured: bool) -> Callable[[Planted], Found]:
    """`half_lives` of the planted coordinates: reported right (to 1e-6; beyond a million tokens is for ever)."""

    def method(p: Planted) -> Found:
        life = half_lives(p.model, mean_dt(p.model, p.ids) if measured else None)
        there: Cells = {(*c, min(t, 1e6)) for c, t in p.truth.half_life.items()}
        close = {t for t in there if abs(float(life[t[:3]].clamp(max=1e6)) / t[3] - 1) < 1e-6}  # type: ignore[index, operator]
        return Found(close, there)

    return method


# -- what must fail ---------------------------------------------------------------------------------------------------


def largest(difference: bool) -> Callable[[Planted], Found]:
    """No method but a control: as many of the largest |h|, or differences of h, as there are coordinates that count."""

    def method(p: Planted) -> Found:
        states = at.ssm_state(pos=p.ids.shape[1] - 2)
        with torch.no_grad():
            base, donor = (run(p.model, ids, record=[states])[states] for ids in (p.ids, p.donor_ids))
        size = (donor - base if difference else base).abs().amax(1)  # (layers, e, n)
        least = NEGLIGIBLE * float(p.gap.abs().max())
        there: Cells = {c for c, v in p.truth.coordinates.items() if v[-2].abs().max() > least}
        top = size.flatten().topk(max(1, len(there))).indices
        where = torch.stack(torch.unravel_index(top, size.shape), 1)
        return Found({tuple(i) for i in where.tolist()}, there)

    return method


METHODS: dict[str, Callable[[Planted], Found]] = {
    **{f"`patch_grid`, `{s}`": patching(s) for s in ("ssm_state", "state_write", "conv_state", "resid_pre")},
    "`gradients` x difference, by coordinate": by_gradient,
    **{f"`knockout_grid`, `{s}`": knocking_out(s) for s in ("scan", "conv", "selection", "all")},
    "`receptive_field`": fields,
    "`gradient_field`": gradient_fields,
    "`logit_lens`": logit_lenses,
    "`direct_logit`": direct_logits,
    "`state_lens`, by coordinate": lens_coordinates,
    "`state_lens`, by position": lens_positions,
    "`half_lives`, of the bias": lives(measured=False),
    "`half_lives`, of the mean dt": lives(measured=True),
    "control: largest state": largest(difference=False),
    "control: largest difference": largest(difference=True),
}


def score(method: str, name: str, seeds: tuple[int, ...] = SEEDS) -> dict[str, Any]:
    """One cell of the table: the worst of the seeds, how many cells are there, and the largest error if it has one."""
    found = [METHODS[method](plant(name, seed)) for seed in seeds]
    errors = [f.error for f in found if f.error is not None]
    return {
        "recall": min(f.recall for f in found),
        "precision": min(f.precision for f in found),
        "there": [len(f.there) for f in found],
        "reported": [len(f.reported) for f in found],
        "error": max(errors) if errors else None,
    }


def score_all(seeds: tuple[int, ...] = SEEDS, *, progress: bool = True) -> dict[str, dict[str, dict[str, Any]]]:
    """Every method on every model: {method: {model: score}}."""
    with tqdm(total=len(METHODS) * len(MODELS), desc="planted", disable=not progress) as bar:
        table: dict[str, dict[str, dict[str, Any]]] = {}
        for method in METHODS:
            table[method] = {}
            for name in MODELS:
                bar.set_postfix_str(f"{method} on {name}")
                table[method][name] = score(method, name, seeds)
                bar.update()
    return table
